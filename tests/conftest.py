"""What tests of several layers share: the real files, and small datasets of blobs."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run, and no deadline: machines that run tests are busy machines.
settings.register_profile("medseg", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("medseg")

_SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the repository; the test is skipped where there is none."""
    if not _SHARED.is_dir():
        pytest.skip("no real files beside this repository")
    return _SHARED


def tiny_task(
    folder: Path,
    cases: int = 6,
    *,
    shape: tuple[int, int, int] = (20, 24, 16),
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    channels: Sequence[str] = ("CT",),
    labels: Sequence[str] = ("left blob", "right blob"),
    unlabelled: int = 0,
    seed: int = 0,
) -> Path:
    """Write a Decathlon-like task of noisy ellipsoids, one per label, and return its folder.

    Case ids are ``blob_000``, ``blob_001``, ...; sizes vary by a voxel or two from case to case,
    and ``unlabelled`` more cases stand in imagesTs.
    """
    rng = np.random.default_rng(seed)
    name = folder.name.split("_", 1)[-1]
    training, test = [], []
    for number in range(cases + unlabelled):
        size = np.array(shape) + rng.integers(-1, 3, 3)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = rng.uniform(-50, 50, 3).round(2)
        index = np.stack(np.indices(size), axis=-1)
        seg = np.zeros(size, dtype=np.uint8)
        for label in range(1, len(labels) + 1):
            along_x = label / (len(labels) + 1)
            centre = (size - 1) * np.array([along_x, 0.5, 0.5]) + rng.uniform(-1, 1, 3)
            radius = size * np.array([0.8 / (len(labels) + 1) / 2, 0.22, 0.25])
            seg[(((index - centre) / radius) ** 2).sum(axis=-1) <= 1] = label
        image = np.stack([seg * 100.0 * (c + 1) + rng.normal(0, 20, size) for c in range(len(channels))], axis=-1)
        image = np.rint(image if len(channels) > 1 else image[..., 0]).astype(np.int16)
        where = "Tr" if number < cases else "Ts"
        path = f"blob_{number:03d}.nii.gz"
        _save(folder / f"images{where}" / path, image, affine)
        if number < cases:
            _save(folder / "labelsTr" / path, seg, affine)
            training.append({"image": f"./imagesTr/{path}", "label": f"./labelsTr/{path}"})
        else:
            test.append(f"./imagesTs/{path}")
    descriptor: dict[str, Any] = {
        "name": name,
        "description": "Random ellipsoids",
        "reference": "made up",
        "licence": "CC0",
        "tensorImageSize": "4D" if len(channels) > 1 else "3D",
        "modality": {str(i): c for i, c in enumerate(channels)},
        "labels": {str(i): label for i, label in enumerate(["background", *labels])},
        "numTraining": cases,
        "numTest": unlabelled,
        "training": training,
        "test": test,
    }
    (folder / "dataset.json").write_text(json.dumps(descriptor, indent=1))
    return folder


def _save(path: Path, values: Any, affine: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


@pytest.fixture(scope="session", name="tiny_task")
def tiny_task_fixture() -> Callable[..., Path]:
    """`tiny_task` for tests in folders that cannot import this file."""
    return tiny_task


def small_plan(
    *,
    dimensions: int = 3,
    slice_axis: int | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    patch: Sequence[int] = (16, 16, 16),
    features: Sequence[int] = (4, 8, 8),
    channels: Sequence[str] = ("CT",),
    labels: dict[int, str] | None = None,
    batch: int = 2,
    family: str = "unet",
    steps: int | None = 5,
    steps_per_epoch: int = 5,
    **training: Any,
) -> Any:
    """A `Plan` for `tiny_task` written by hand, with one configuration called "3d" or "2d" and a
    network that computes in milliseconds, trained for ``steps``. ``training`` takes the place of its own settings."""
    from medseg.plan.plan import parse_plan

    stages = len(features)
    along = [0 if axis == slice_axis else 1 for axis in range(3)]
    kernel, stride = [1 + 2 * a for a in along], [1 + a for a in along]
    rules = [
        {"channel": c, "kind": "ct", "low": -100, "high": 300, "mean": 50, "std": 50} if c == "CT" else
        {"channel": c, "kind": "zscore"}
        for c in channels
    ]  # fmt: skip
    settings = {"learning_rate": 5e-3, "weight_decay": 1e-2, "foreground_share": 0.5, **training}
    augmentation = settings.pop("augmentation", {})
    plan = {
        "task": "Task00_blobs",
        "channels": list(channels),
        "labels": [{"name": n, "number": i} for i, n in (labels or {1: "left blob", 2: "right blob"}).items()],
        "normalisation": {"value": rules},
        "configurations": {
            f"{dimensions}d": {
                "dimensions": dimensions,
                "slice_axis": slice_axis,
                "spacing": {"value": list(spacing)},
                "patch": {"value": list(patch)},
                "batch": {"value": batch},
                **({"steps": {"value": steps}} if steps else {}),
                "network": {
                    "value": {
                        "family": family,
                        "features": list(features),
                        "kernels": [kernel] * stages,
                        "strides": [[1, 1, 1]] + [stride] * (stages - 1),
                    }
                },
            }
        },
        "training": {
            **{name: {"value": value} for name, value in settings.items()},
            "augmentation": {"value": augmentation},
            "steps_per_epoch": steps_per_epoch,
        },
        "fingerprint": "",
    }
    return parse_plan(plan, "the small plan")


@pytest.fixture(scope="session", name="small_plan")
def small_plan_fixture() -> Callable[..., Any]:
    """`small_plan`, likewise."""
    return small_plan


def dicom_series(
    folder: Path,
    *,
    values: Any = None,
    shape: tuple[int, int, int] = (6, 5, 4),
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    rows: Sequence[float] = (1, 0, 0),
    columns: Sequence[float] = (0, 1, 0),
    first: Sequence[float] = (0, 0, 0),
    step: Sequence[float] | None = None,
    change: Callable[[Any, int], None] = lambda dataset, k: None,
    name: Callable[[int], str] = "{}.dcm".format,
    **attributes: Any,
) -> list[Path]:
    """Write a CT series of one slice a file. ``shape`` and ``spacing`` (mm) are along columns of a
    slice, rows, slices; the directions and ``first`` are LPS; ``step`` takes the place of the
    normal times the last spacing. ``values`` (columns, rows, slices) are stored as int16 and come
    to HU by 1, -1000. ``change`` may spoil slice k."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    values = np.zeros(shape, dtype=np.int16) if values is None else np.asarray(values, dtype=np.int16)
    normal = np.cross(rows, columns) * spacing[2] if step is None else np.asarray(step)
    study, series = generate_uid(), generate_uid()
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(values.shape[2]):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Roe^Richarda", "ID-471199", "19031224"
        dataset.AccessionNumber = "ACC-771177"
        dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "CT", 5, k + 1
        dataset.SeriesDescription = "Abdomen"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Columns, dataset.Rows = values.shape[:2]
        dataset.PixelSpacing = [spacing[1], spacing[0]]
        dataset.SliceThickness = spacing[2]
        dataset.ImageOrientationPatient = [*rows, *columns]
        dataset.ImagePositionPatient = [round(float(v), 6) for v in np.asarray(first) + k * normal]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1000
        dataset.PixelData = values[:, :, k].T.tobytes()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        change(dataset, k)
        paths.append(folder / name(k))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.fixture(scope="session", name="dicom_series")
def dicom_series_fixture() -> Callable[..., list[Path]]:
    """`dicom_series`, likewise."""
    return dicom_series


class FileServer:
    """Files over HTTP from this machine, to be asked in earnest. ``files`` maps a path to its bytes; ``then`` holds
    what is done at the next requests (a function of the handler and the file's bytes), `serve` once it is empty;
    ``asked`` is what came: path and headers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = '"first"'
        self.then: list[Callable[[Any, bytes], None]] = []
        self.asked: list[tuple[str, Mapping[str, str]]] = []
        self.over = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                action = server.then.pop(0) if server.then else server.serve
                with contextlib.suppress(ConnectionError):
                    action(self, server.files.get(self.path, b""))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def serve(self, handler: Any, data: bytes, *, cut: int | None = None, stall: bool = False) -> None:
        """As a good server does; with ``cut``, only so many bytes of what it promised, and then the end or silence."""
        if handler.path not in self.files:
            return handler.send_error(404)
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if handler.headers.get("If-Range", self.etag) != self.etag:
            asked = None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(data):
            return handler.send_error(416)
        headers = {"Content-Length": len(data) - start}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.etag:
            headers["ETag"] = self.etag
        return self.answer(handler, 206 if asked else 200, headers, data[start:][:cut], stall=stall)

    def answer(self, handler: Any, status: int, headers: Any, data: bytes, *, stall: bool = False) -> None:
        """Any answer."""
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(data)
        handler.wfile.flush()
        if stall:
            self.over.wait(30)


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A `FileServer`; nothing but this machine can be asked for meanwhile."""
    real = socket.getaddrinfo

    def only_here(host: Any, *rest: Any, **more: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), "a test asked for the outside network"
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    server = FileServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.over.set()
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def packed(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A plain tar: of each name its bytes, or a member as it is; names that end in a slash are folders."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.mode, member.uid, member.uname = 0o700, 501, "someone"
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(scope="session", name="packed")
def packed_fixture() -> Callable[..., bytes]:
    """`packed`, likewise."""
    return packed
