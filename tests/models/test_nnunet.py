"""Models that nnU-Net trained (nnunet/README.md), and what is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.core.volume import LabelMap, Volume
from medseg.infer.engine import open_engine
from medseg.infer.predict import Predictor, segment
from medseg.io.nifti import read_volume
from medseg.io.sources import unpacked
from medseg.models import nnunet
from medseg.models.checkpoint import Checkpoint, read_checkpoints
from medseg.models.nnunet import belongs, import_nnunet
from medseg.models.package import ModelPackage, load_package, save_package
from medseg.models.shelf import most_unpacked

HERE = Path(__file__).with_name("nnunet")
VARIANTS = [
    ("ct", "3d_fullres"),
    ("flat", "2d"),
    ("regions", "3d_fullres"),
    ("thick", "3d_fullres"),
    ("cascade", "3d_lowres"),
    ("cascade", "3d_cascade_fullres"),
]


def scan_of(variant: str) -> Volume:
    volumes = [read_volume(path) for path in sorted((HERE / variant).glob("scan_*.nii.gz"))]
    return Volume(np.concatenate([v.values for v in volumes]), volumes[0].grid)


def labels_of(name: str, variant: str, like: Volume, package: ModelPackage) -> LabelMap:
    values = read_volume(HERE / variant / f"{name}.nii.gz").values[0]
    return LabelMap(values.astype(np.uint8), like.grid, package.plan.label_set)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "configuration"), VARIANTS)
def test_labels_are_those_of_nnunet(variant: str, configuration: str, tmp_path: Path) -> None:
    """All but a voxel or two where nnU-Net adds its logits up in float32; it does so in half precision, which
    turns a few voxels between two labels."""
    save_package(tmp_path / "p", import_nnunet(HERE / variant / "models", configuration=configuration))
    package = load_package(tmp_path / "p")
    assert package.graphs, package.not_portable
    scan = scan_of(variant)
    previous = labels_of("3d_lowres_plain", variant, scan, package) if package.previous else None
    mirror = package.plan.training.augmentation.value.mirror
    for name, axes, engine, share in (
        ("exact", (), "torch-cpu", 3e-4),
        ("exact", (), "openvino", 3e-4),
        ("plain", (), "torch-cpu", 2e-3),
        ("mirrored", mirror, "torch-cpu", 2e-3),
    ):
        made = segment(
            open_engine(package, engine, 1, axes, "f32"), scan, package.plan, configuration, previous=previous
        )
        found, wanted = made.label_map.values, labels_of(f"{configuration}_{name}", variant, scan, package).values
        foreground = np.count_nonzero((found > 0) | (wanted > 0))
        assert foreground > 1000
        assert np.count_nonzero(found != wanted) <= share * foreground, (name, engine)


@pytest.mark.slow
def test_a_cascade_predicts_both_its_stages(tmp_path: Path) -> None:
    save_package(tmp_path / "p", import_nnunet(HERE / "cascade" / "models", configuration="3d_cascade_fullres"))
    package = load_package(tmp_path / "p")
    scan = scan_of("cascade")
    # Without mirroring: nnU-Net gave its second stage the plain labels of the first.
    predictor = Predictor(package, "torch-cpu", threads=1, thoroughness="quick", overlap=0.5)
    found = predictor.predict(scan).label_map.values
    wanted = labels_of("3d_cascade_fullres_plain", "cascade", scan, package).values
    assert np.count_nonzero(found != wanted) <= 0.01 * np.count_nonzero(wanted)
    (tmp_path / "p" / "previous" / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="was changed"):
        load_package(tmp_path / "p")


@pytest.mark.slow
def test_predict_does_by_itself_what_nnunet_does(tmp_path: Path) -> None:
    """Half overlap, mirrored copies, all folds."""
    save_package(tmp_path / "p", import_nnunet(HERE / "ct" / "models"))
    package = load_package(tmp_path / "p")
    scan = scan_of("ct")
    found = Predictor(package, threads=1).predict(scan).label_map.values
    wanted = labels_of("3d_fullres_mirrored", "ct", scan, package).values
    assert np.count_nonzero(found != wanted) <= 2e-3 * np.count_nonzero(wanted)


def test_a_second_stage_without_its_first_is_refused(tmp_path: Path) -> None:
    (stage,) = (HERE / "cascade" / "models").glob("*3d_cascade_fullres")
    shutil.copytree(stage, tmp_path / stage.name)
    with pytest.raises(InputError, match="3d_lowres is not beside it"):
        import_nnunet(tmp_path)


def test_of_several_models_none_is_guessed() -> None:
    with pytest.raises(InputError, match="3d_cascade_fullres, 3d_lowres"):
        import_nnunet(HERE / "cascade" / "models")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a model, to be spoilt."""
    (source,) = (HERE / "ct" / "models").iterdir()
    return Path(shutil.copytree(source, tmp_path / source.name))


@pytest.fixture(scope="module")
def read_once() -> dict[str, Checkpoint]:
    """The checkpoints of ``ct`` by their folds: reading them takes a process and its torch."""
    paths = sorted((HERE / "ct" / "models").glob("*/fold_*/checkpoint_final.pth"))
    return dict(zip([path.parent.name for path in paths], read_checkpoints(paths), strict=True))


@pytest.fixture
def quick(read_once: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunet, "read_checkpoints", lambda paths: [read_once[p.parent.name] for p in paths])


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        import_nnunet(model)


@pytest.mark.usefixtures("quick")
def test_a_fold_without_a_checkpoint_is_named(model: Path) -> None:
    (model / "fold_1" / "checkpoint_final.pth").unlink()
    with pytest.raises(InputError, match="fold_1 has no checkpoint_final"):
        import_nnunet(model)
    assert len(import_nnunet(model, folds=("0",)).members) == 1


def test_a_fold_that_is_not_there_is_named(model: Path) -> None:
    with pytest.raises(InputError, match="no fold 7; it has 0, 1"):
        import_nnunet(model, folds=("7",))


def test_a_folder_of_anything_else_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained model"):
        import_nnunet(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(model: Path, share: float) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_checkpoints([path])


class Hostile:
    """What its pickle asks for, when it is read by one that believes it."""

    def __init__(self, touches: Path) -> None:
        self.touches = touches

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch '{self.touches}'",)


def test_a_pickle_that_wants_a_shell_gets_none(tmp_path: Path) -> None:
    path, trace = tmp_path / "fold_0" / "checkpoint_final.pth", tmp_path / "trace"
    path.parent.mkdir()
    torch.save({"network_weights": {}, "logging": Hostile(trace)}, path)
    with pytest.raises(InputError, match=r"wants to run posix\.system"):
        read_checkpoints([path])
    assert not trace.exists()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    huge = torch.zeros(1).expand(1 << 40)
    torch.save(
        {"network_weights": {"x": huge}, "trainer_name": "", "init_args": {"configuration": "2d", "fold": 0}}, path
    )
    with pytest.raises(Exception, match="needs more memory"):
        read_checkpoints([path])


def test_weights_of_something_else_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="no checkpoint of nnU-Net"):
        read_checkpoints([path])


def layers(plans: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: layers(p).update(features_per_stage=[4, 8, 16]), "do not fit the network"),
        (lambda p: layers(p).update(nonlin="os.system"), "nonlin"),
        (lambda p: layers(p).update(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"), "norm_op"),
        (lambda p: layers(p).update(squeeze_excitation=True), "squeeze_excitation"),
        (lambda p: layers(p).update(strides=[[1, 1, 1], [2, 2, 2]]), "lists 2"),
        (
            lambda p: p["configurations"]["3d_fullres"]["architecture"].update(network_class_name="a.b.Primus"),
            "network of the kind 'Primus'",
        ),
        (lambda p: p["configurations"]["3d_fullres"].update(normalization_schemes=["Mine"]), "normalises by 'Mine'"),
        (lambda p: p["configurations"]["3d_fullres"].update(preprocessor_name="Mine"), "preprocessor_name"),
        (
            lambda p: p["configurations"]["3d_fullres"].update(resampling_fn_data="resample_torch_fornnunet"),
            "resampling_fn_data",
        ),
        (lambda p: p["configurations"]["3d_fullres"].update(inherits_from="3d_fullres"), "no configuration"),
        (lambda p: p.update(image_reader_writer="NaturalImage2DIO"), "reads images with"),
        (lambda p: p.update(transpose_forward=[0, 0, 1]), "transpose_forward"),
        (lambda p: p["configurations"].pop("3d_fullres"), "no configuration"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(
    model: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edited(model / "plans.json", change)
    with pytest.raises(InputError, match=words):
        import_nnunet(model, folds=("0",))


@pytest.mark.usefixtures("quick")
def test_old_plans_describe_the_same_network(model: Path) -> None:
    """Before nnU-Net 2.4 the network stood in keys of its own."""
    new = import_nnunet(model, folds=("0",))

    def old(plans: dict[str, Any]) -> None:
        one = plans["configurations"]["3d_fullres"]
        kwargs = one.pop("architecture")["arch_kwargs"]
        one |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 4,
            "unet_max_num_features": 8,
            "conv_kernel_sizes": kwargs["kernel_sizes"],
            "pool_op_kernel_sizes": kwargs["strides"],
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        }

    edited(model / "plans.json", old)
    assert import_nnunet(model, folds=("0",)).configuration.network.value == new.configuration.network.value


# ---- zips ---------------------------------------------------------------------------------------


def zipped(model: Path, **more: bytes) -> Path:
    path = model.parent / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in model.rglob("*") if p.is_file()):
            archive.write(file, f"Dataset901_ct/{model.name}/{file.relative_to(model)}")
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def imported(path: Path) -> Any:
    with unpacked(path, belongs, most=most_unpacked(path)) as folder:
        return import_nnunet(folder, folds=("0",))


@pytest.mark.usefixtures("quick")
def test_a_zip_gives_what_its_folder_gives(model: Path) -> None:
    assert imported(zipped(model)).digest() == import_nnunet(model, folds=("0",)).digest()


@pytest.mark.parametrize("name", ["../plans.json", "/plans.json", "a/../../plans.json", "C:\\plans.json"])
def test_a_zip_that_climbs_out_is_refused(model: Path, name: str) -> None:
    with pytest.raises(InputError, match="leads out"):
        imported(zipped(model, **{name: b"{}"}))


def test_a_bomb_is_refused_before_it_is_unpacked(model: Path) -> None:
    with pytest.raises(InputError, match="unpacks to"):
        imported(zipped(model, **{"x/fold_0/checkpoint_final.pth": bytes(1 << 29)}))


def test_a_truncated_zip_is_refused(model: Path) -> None:
    path = zipped(model)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="not a sound zip"):
        imported(path)
