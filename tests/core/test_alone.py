from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nibabel_comes_without_pydicom_which_can_follow() -> None:
    code = "import sys, medseg.io.nifti; print('pydicom' in sys.modules); import pydicom; print(pydicom.__name__)"
    assert run(code).split() == ["False", "pydicom"]


def test_a_nifti_file_is_read_without_pydicom() -> None:
    code = "import sys, medseg.io.scan, medseg.infer.predict; print({'pydicom', 'scipy.ndimage'} & set(sys.modules))"
    assert run(code) == "set()"


def test_what_is_loaded_already_stays() -> None:
    code = "import pydicom as one, medseg.io.nifti, sys; print(sys.modules['pydicom'] is one)"
    assert run(code) == "True"
