#!/usr/bin/env bash
# Check, plan and preprocess a Decathlon task: medseg beside nnU-Net v2, three rounds, turn by turn.
#
#   bash benchmarks/prepare/compare.sh data/Task04_Hippocampus PEER
#
# PEER is a virtual environment of its own with nnunetv2 in it (and psutil). Both use two processes or
# threads; both check the data (nnU-Net with --verify_dataset_integrity).
set -euo pipefail
task=$1 peer=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export nnUNet_raw=$work/raw nnUNet_preprocessed=$work/preprocessed nnUNet_results=$work/results
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
# The peer's converter takes every file of a folder for a case, so it gets the Decathlon's files alone.
mkdir "$work/$(basename "$task")"
cp -r "$task"/imagesTr "$task"/labelsTr "$task"/dataset.json "$work/$(basename "$task")"
mkdir -p "$work/$(basename "$task")/imagesTs"
"$peer/bin/nnUNetv2_convert_MSD_dataset" -i "$work/$(basename "$task")" -np 2 >&2

cat > "$work/medseg.sh" <<EOF
set -e
rm -rf "$work/run"
medseg check "$task"
medseg plan "$task" -o "$work/run" --no-measure  # nnU-Net times no step either
medseg preprocess "$work/run" -c 3d --threads 2
EOF
cat > "$work/nnunet.sh" <<EOF
set -e
rm -rf "$nnUNet_preprocessed"/*
"$peer/bin/nnUNetv2_plan_and_preprocess" -d 4 -c 3d_fullres -np 2 -npfp 2 --verify_dataset_integrity
EOF
echo "| command | runs | least (s) | median (s) | most (s) | peak memory (GiB) |"
echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
for round in 1 2 3; do
  for one in medseg nnunet; do
    python "$here/../measure.py" bash "$work/$one.sh" 2>> "$work/$one.log" | sed "s#bash $work/$one.sh#$one, round $round#"
  done
done
