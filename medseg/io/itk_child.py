"""Run in a process of its own, never imported: reads one file with SimpleITK into shared memory.

    python itk_child.py KIND PATH FD BYTES MEMORY SECONDS

Puts the voxels of PATH, which must come to BYTES, into the file descriptor FD, x fastest but for the
channels, and prints as JSON what SimpleITK says of them, or ``{"error": ...}``. It may take MEMORY
bytes beyond its libraries and SECONDS of processor time; a crash ends this process and no other.
"""

import json
import mmap
import resource
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813


def _limit(memory: int, seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(kind: str, path: str, descriptor: int, size: int) -> dict[str, object]:
    reader = sitk.ImageFileReader()
    # Not by what the file looks like: it shall not choose among thirty readers.
    reader.SetImageIO(kind)
    reader.SetFileName(path)
    image = reader.Execute()
    values = sitk.GetArrayViewFromImage(image)
    if values.nbytes != size or values.dtype.kind not in "iuf":
        return {"error": "other"}
    with mmap.mmap(descriptor, size) as shared:
        into = np.frombuffer(shared, dtype=values.dtype).reshape(values.shape)
        into[...] = values
        del into
    return {
        "size": image.GetSize(),
        "channels": image.GetNumberOfComponentsPerPixel(),
        "dtype": values.dtype.str,
        "spacing": image.GetSpacing(),
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
    }


def main() -> None:
    """As above."""
    kind, path, *numbers = sys.argv[1:]
    descriptor, size, memory, seconds = map(int, numbers)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    _limit(memory, seconds)
    try:
        answer = _read(kind, path, descriptor, size)
    except MemoryError:
        answer = {"error": "memory"}
    except RuntimeError as error:
        short = any(words in str(error) for words in ("llocate", "bad_alloc", "memory"))
        answer = {"error": "memory" if short else "reader"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
