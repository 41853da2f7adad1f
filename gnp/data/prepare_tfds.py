"""Preparing data sets with TensorFlow Datasets (TFDS), which needs TensorFlow.

Reading what is prepared, in `gnp.data.tfds`, does not.
"""

import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gnp.data import download
from gnp.data.records import first_line
from gnp.errors import UserError


def prepare_tfds(name: str, root: Path) -> Path:
    """Downloads and prepares a data set as ArrayRecord, where that is possible.

    Safe to interrupt and to run again: TFDS writes into a folder of another name and renames it
    when all is there, and downloads are kept.

    Args:
      name: as TFDS has it; "cifar10", "cifar10:3.0.2", "imagenet_resized/32x32".
      root: the folder of all data sets.

    Returns:
      The folder of the prepared data set, ROOT/NAME/VERSION.

    Raises:
      UserError: if that needs TensorFlow, which is not installed, a network that does not answer,
        or files that a person must fetch; says what to do.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=str(root), try_gcs=False)
    except Exception as error:  # of versions and configurations that are not there
        raise UserError(f"TFDS cannot make {name}: {first_line(error)}") from None
    folder = Path(builder.data_dir)  # ROOT/NAME/VERSION
    if builder.is_prepared():
        return folder
    if folder.exists():  # TFDS would take it for the data set
        raise UserError(f"{folder} holds no prepared data set: remove it")
    elsewhere = (
        f"python -m gnp.prepare {name} --data_dir=NEW, and copy NEW/{builder.name} to {root}"
    )
    if not has_tensorflow():
        raise UserError(
            f"{name} is not in {root} (no {folder}), and downloading it needs TensorFlow: "
            f"pip install tensorflow and run this again, or run where it is installed: {elsewhere}"
        )
    _check_manual_files(builder)
    for url in _urls_to_download(builder):
        if not download.is_reachable(url):
            raise UserError(
                f"{name} is not in {root} (no {folder}) and cannot be downloaded: no connection "
                f"to {url}; run where there is one: {elsewhere}"
            )
    _restrain_tensorflow()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of the network, the disk, the archive
        raise UserError(f"cannot prepare {name} in {root}: {first_line(error)}") from error
    return folder


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


def _check_manual_files(builder: Any) -> None:
    """Says it if a person must fetch files first, as those of ImageNet, which wants an account."""
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions:
        return
    manual = Path(builder.data_dir_root) / "downloads" / "manual"
    # Other data sets' files may be there too, but only ImageNet's are always named in full.
    named = re.findall(r"ILSVRC2012_\w+\.tar", instructions)
    there = manual.is_dir() and any(manual.iterdir())
    if not there or not all((manual / name).is_file() for name in named):
        wanted = " ".join(instructions.replace("`", "").split())
        raise UserError(
            f"{builder.name} cannot be downloaded by a program: fetch its files by hand into "
            f"{manual} and run this again ({wanted})"
        )


def _urls_to_download(builder: Any) -> list[str]:
    """The files that TFDS would download, without those that it already has."""
    from tensorflow_datasets.core.download import resource

    downloads = Path(builder.data_dir_root) / "downloads"
    urls = []
    for url, info in (builder.url_infos or {}).items():
        cached = resource.get_dl_fname(url, info.checksum)
        places = [downloads / builder.name / cached, downloads / cached]
        if info.filename:
            places.append(downloads / "manual" / info.filename)
        elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # never downloaded, whatever the list says
            places.append(downloads / "manual" / Path(urlsplit(url).path).name)
        if not any(path.exists() for path in places):
            urls.append(url)
    return urls


def _restrain_tensorflow() -> None:
    """Keeps TensorFlow quiet and off the GPU, all of whose memory it would take from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # already running, so the program has its own wishes
        tf.config.set_visible_devices([], "GPU")
