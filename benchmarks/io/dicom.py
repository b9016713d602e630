"""Read a CT series with medseg, SimpleITK and dcm2niix, and write labels as DICOM; print Markdown tables.

    taskset -c 0 python benchmarks/io/dicom.py --folder FOLDER --repeat 5

The CT and its 20 organs are those of `nifti.py`: 512x512x400 int16 as 400 files, native and in JPEG 2000
without loss. Labels are written for every second slice, 200 of them. Each measurement is a process of
its own. For Python its time leaves imports out, and its memory is the peak beyond what it had after them
(and, for writing, after the labels were read), in units of the array; dcm2niix is timed as a whole
program that writes an unpacked NIfTI, and its memory is all that it had. The processor's seconds are
the fairer figure where other programs run beside.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
from nifti import SHAPE, make, peak_kilobytes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

READ = [f"{program} {kind}" for kind in ("native", "jpeg2000") for program in ("medseg", "SimpleITK", "dcm2niix")]
WRITE = ["medseg seg", "medseg seg-labelmap", "medseg rtstruct", "medseg read-seg", "medseg read-rtstruct"]
NAMES = [f"organ {n}" for n in range(1, 21)]


def make_series(folder: Path, values: np.ndarray, thickness: float, *, packed: bool = False) -> None:
    """Write stored values (x, y, z), LPS axes, as one file a slice; HU are they less 1024. Once."""
    import imagecodecs
    from pydicom.encaps import encapsulate

    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(values.shape[2]):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless if packed else ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.PatientName, dataset.PatientID, dataset.Modality = "Nobody", "0", "CT"
        dataset.SeriesNumber, dataset.InstanceNumber, dataset.ImageType = 1, k + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Columns, dataset.Rows = values.shape[:2]
        dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.8], thickness
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-200, -200, k * thickness]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        pixels = np.ascontiguousarray(values[:, :, k].T, dtype=np.uint16)
        if packed:
            data = imagecodecs.jpeg2k_encode(pixels, reversible=True, level=0, codecformat="j2k")
            dataset.PixelData = encapsulate([data])
            dataset["PixelData"].VR = "OB"
        else:
            dataset.PixelData = pixels.tobytes()
        dataset.save_as(part / f"{generate_uid()}.dcm", enforce_file_format=True)
    part.rename(folder)


def make_all(folder: Path) -> None:
    """The two series that are read, the one that is written for, and its labels. Once."""
    from medseg.core.labels import LabelSet
    from medseg.io.nifti import read_labels, read_volume

    make(folder)
    if not (folder / "jpeg2000").exists() or not (folder / "half").exists():
        values = read_volume(folder / "ct.nii.gz").values[0] + 1024
        make_series(folder / "native", values, 1.0)
        make_series(folder / "half", values[:, :, ::2], 2.0)
        make_series(folder / "jpeg2000", values, 1.0, packed=True)
    labels = read_labels(folder / "labels.nii.gz", LabelSet.from_names(NAMES)).values[:, :, ::2]
    np.save(folder / "labels.npy", np.ascontiguousarray(labels))


def task_of(what: str, folder: Path):
    """What to do, as a function; what it needs is loaded before."""
    program, part = what.split()
    if program == "SimpleITK":
        import SimpleITK as sitk  # noqa: N813

        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

        def read_with_itk() -> np.ndarray:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder / part)))
            return sitk.GetArrayViewFromImage(reader.Execute())

        return read_with_itk
    import imagecodecs  # noqa: F401

    from medseg.core.labels import LabelSet
    from medseg.core.volume import LabelMap
    from medseg.io.dicom import choose, find_series, read_series
    from medseg.io.dicom_seg import Algorithm, write_seg
    from medseg.io.dicom_seg_read import read_seg
    from medseg.io.reference import reference_of
    from medseg.io.rtstruct import read_rtstruct, write_rtstruct

    if part in ("native", "jpeg2000"):
        return lambda: read_series(choose(find_series(folder / part))).values
    import highdicom  # noqa: F401
    import skimage.draw
    import skimage.measure  # noqa: F401

    series = choose(find_series(folder / "half"))
    if part == "read-seg":
        return lambda: read_seg(folder / "seg.dcm", onto=series.grid).label_map.values
    if part == "read-rtstruct":
        return lambda: read_rtstruct(folder / "rtstruct.dcm", series.grid).label_map.values
    labels = LabelMap(np.load(folder / "labels.npy"), series.grid, LabelSet.from_names(NAMES))
    made_by = Algorithm("AUTOMATIC", "benchmark", "1")
    if part == "rtstruct":
        return lambda: write_rtstruct(folder / "rtstruct.dcm", labels, reference_of(series), made_by)
    kind = "labelmap" if part == "seg-labelmap" else "binary"
    return lambda: write_seg(folder / f"{part}.dcm", labels, reference_of(series), made_by, kind=kind)


def measure(what: str, folder: Path) -> None:
    """In the child: do it once; print seconds, those of the processor, and peak bytes beyond the start."""
    if what.startswith("dcm2niix"):
        out = folder / "dcm2niix-out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        started = time.perf_counter()
        command = ["dcm2niix", "-z", "n", "-b", "n", "-o", str(out), str(folder / what.split()[1])]
        subprocess.run(command, check=True, capture_output=True)
        seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
        return
    do = task_of(what, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_kilobytes()
    started, busy = time.perf_counter(), time.process_time()
    result = do()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    print(json.dumps([seconds, busy, (peak_kilobytes() - before) * 1024]))
    del result


def main() -> None:
    """Make what is missing, measure each some times in turn, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="Some of the rows.")
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    make_all(options.folder)
    rows: dict[str, list[list[float]]] = {w: [] for w in (*READ, *WRITE) if not options.only or w in options.only}
    for _ in range(options.repeat):
        for what, runs in rows.items():
            command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", what]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {what: statistics.median(run[1] for run in runs) for what, runs in rows.items()}
    print("| what | processor s, median | least | most | times medseg's | median s | peak memory, of the array |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for what, runs in rows.items():
        size = 2 * np.prod(SHAPE) if what in READ else np.prod(SHAPE) // 2
        ours = medians.get(f"medseg {what.split()[1]}", medians[what])
        ratio = f"{medians[what] / ours:.1f}" if what in READ else ""
        busy, peak = [run[1] for run in runs], max(run[2] for run in runs) / size
        line = f"| {what} | {medians[what]:.2f} | {min(busy):.2f} | {max(busy):.2f} | {ratio} "
        print(f"{line}| {statistics.median(run[0] for run in runs):.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
