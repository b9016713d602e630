#!/usr/bin/env bash
# nnU-Net and medseg on the same scans with the same network, turn by turn: whole commands, wall time and peak memory.
#
#     bash benchmarks/predict/compare.sh PEER SCANS_FOLDER MODEL_FOLDER [ROUNDS]
#
# PEER: an environment with nnunetv2 2.8.1. SCANS_FOLDER: NIfTI files named as nnU-Net wants them (scan_0000.nii.gz).
# MODEL_FOLDER: of nnU-Net, as peer_model.py makes it or nnU-Net trained it. Mirroring is off in both.
set -euo pipefail
peer=$1 scans=$2 model=$3 rounds=${4:-3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export nnUNet_raw=$work nnUNet_preprocessed=$work nnUNet_results=$work
trained=$(dirname "$(dirname "$(find "$model" -name checkpoint_final.pth | head -1)")")
medseg models import "$model" -o "$work/package" >&2
measure="python $(dirname "$0")/../measure.py --repeat 1"
echo "| command | runs | best (s) | median (s) | worst (s) | processor (s) | peak (GiB) |"
echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
for round in $(seq "$rounds"); do
  if [ "$peer" != - ]; then
    $measure "$peer/bin/nnUNetv2_predict_from_modelfolder" -i "$scans" -o "$work/peer$round" -m "$trained" -f 0 \
      -device cpu --disable_tta -npp 1 -nps 1 --disable_progress_bar
  fi
  $measure medseg predict "$scans" -m "$work/package" -o "$work/mine$round" --quick --overlap 0.5
  $measure medseg predict "$scans" -m "$work/package" -o "$work/quick$round" --quick
done
if [ "$peer" != - ]; then python "$(dirname "$0")/same.py" "$work/peer1" "$work/mine1"; fi
