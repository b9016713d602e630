"""The share of voxels that two folders of label maps have in common.

python benchmarks/predict/same.py PEER_FOLDER MEDSEG_FOLDER
"""

import sys
from pathlib import Path

import numpy as np

from medseg.io.nifti import read_raw_labels, stem


def main(peer: Path, mine: Path) -> None:
    same = foreground = 0
    for path in sorted(peer.glob("*.nii.gz")):
        theirs, grid = read_raw_labels(path)
        (found,) = [p for p in mine.glob("*_seg.nii.gz") if stem(p).startswith(stem(path))]
        ours, other = read_raw_labels(found)
        assert grid.matches(other), path.name
        either = (theirs > 0) | (ours > 0)
        same += int(np.count_nonzero((theirs == ours) & either))
        foreground += int(np.count_nonzero(either))
    print(f"the same label in {same} of {foreground} foreground voxels: {same / max(1, foreground):.4%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
