"""Archives that databases have published once and for all, by address and checksum.

Matbench v0.1 (Dunn et al., npj Comput. Mater. 6, 138 (2020)): addresses and SHA-256 of matminer's
`dataset_metadata.json`; the nine of its tasks that have structures. JARVIS-DFT (Choudhary et al.,
npj Comput. Mater. 6, 173 (2020)): the file of jarvis-tools' `dft_3d`; figshare publishes its size
and MD5, and the SHA-256 is that of the file with both.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import sha256_of
from featurization.addresses import checked_url
from featurization.crystal import ATTRIBUTION
from featurization.download import download
from featurization.snapshot import Snapshot, clear, fetched
from featurization.web import Progress, Say, Web


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that never changes."""

    file: str  # its name, which the reader of Matbench tables looks at
    url: str
    sha256: str
    structures: int
    source: str
    licence: str
    cite: str


_MP = "CC BY 4.0 (Materials Project)"
_PAPER = "see the paper that is cited, and the source that it names"
# Task → structures, licence of the data, SHA-256.
_TASKS = {
    "log_kvrh": (10_987, _MP, "44b113ddb7e23aa18731a62c74afa7e5aa654199e0db5f951c8248a00955c9cd"),
    "log_gvrh": (10_987, _MP, "098af941f4c663270f1fe21abf20ffad6fb85ecbfcba5786ceac03983ac29da7"),
    "mp_gap": (106_113, _MP, "58b65746bd88329986ed66031a2ac1369c7c522f7bc9f9081528e07097c2c057"),
    "mp_is_metal": (
        106_113,
        _MP,
        "9a028ed5750a4c76ca36e9f3c8d48fe0bf3fb21b76ec2289e58ae7048d527919",
    ),
    "mp_e_form": (132_752, _MP, "dedcb1d4ba2e3e50dbdd45ba5bc647a00e9c2bcf8f8bf556dc8e92caa39eb21f"),
    "dielectric": (4_764, _MP, "83befa09bc2ec2f4b6143afc413157827a90e5e2e42c1eb507ccfa01bf26a1d6"),
    "phonons": (1_265, _MP, "4db551f21ec5f577e6202725f10e34dfc509aa7df3a6bdaac497da7f6dbbb9b3"),
    "perovskites": (
        18_928,
        _PAPER,
        "4641e2417f8ec8b50096d2230864468dfa08278dc9d257c327f65d0305278483",
    ),
    "jdft2d": (636, _PAPER, "26057dc4524e193e32abffb296ce819b58b6e11d1278cae329a2f97817a4eddf"),
}
MATBENCH = {
    name: Archive(
        file=f"matbench_{name}.json.gz",
        url=f"https://ml.materialsproject.org/projects/matbench_{name}.json.gz",
        sha256=sha256,
        structures=structures,
        source="Matbench v0.1",
        licence=licence,
        cite="A. Dunn et al., npj Comput. Mater. 6, 138 (2020). " + ATTRIBUTION,
    )
    for name, (structures, licence, sha256) in _TASKS.items()
}
JARVIS = {
    "dft_3d": Archive(
        file="jdft_3d-12-12-2022.json.zip",
        # Not figshare.com/ndownloader, where a firewall gives programs an empty answer (202).
        url="https://ndownloader.figshare.com/files/38521619",
        sha256="d4c64660e9e1fa45c82bd8868a96ec10162195eed69636445972c05550d8d0d6",
        structures=75_993,
        source="JARVIS-DFT 3D of 2022-12-12, doi:10.6084/m9.figshare.6815699.v11",
        licence="CC BY 4.0",
        cite="K. Choudhary et al., npj Comput. Mater. 6, 173 (2020).",
    )
}


def fetch(
    archive: Archive,
    folder: Path,
    *,
    url: str | None = None,
    by_hand: Path | None = None,
    restart: bool = False,
    say: Say,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Put an archive into a folder, under its published name; returns its path and record.

    Args:
        url: a mirror to take it from; the checksum decides.
        by_hand: the file, downloaded already.

    Raises:
        UserError: `by_hand` is another file or comes with `url`, or one of the name is there.
        RunFailed: the server fails, or what it gives is another file.
    """
    path = folder / archive.file
    if by_hand is not None and not by_hand.is_file():
        raise UserError(f"--from {by_hand}: no such file", remedy="give the path of the download")
    if by_hand is not None and url is not None:
        raise UserError(
            f"--from {by_hand} with --url {url}: a file is taken from one place",
            remedy="leave out --url to take the download, or --from to fetch",
        )
    address = checked_url(url or archive.url, "--url")
    request = {"source": archive.source, "sha256": archive.sha256}

    def work(snapshot: Snapshot) -> dict[str, Any]:
        if by_hand is not None:
            _check(archive, by_hand, f"--from {by_hand}", UserError)
            shutil.copyfile(by_hand, snapshot.data)
        else:
            download(Web(say), address, snapshot.data, progress)
        try:
            _check(archive, snapshot.data, address, RunFailed)
        except RunFailed:
            clear(snapshot.folder)
            raise
        return {
            "source": archive.source,
            "url": str(by_hand.absolute()) if by_hand else address,
            "structures": archive.structures,
            "licence": archive.licence,
            "cite": archive.cite,
        }

    return path, fetched(path, request, work, restart=restart)


def _check(
    archive: Archive, path: Path, what: str, failure: type[UserError] | type[RunFailed]
) -> None:
    found = sha256_of(path)
    if found != archive.sha256:
        raise failure(
            f"{what} is not {archive.file} as published: {path.stat().st_size:,} bytes with "
            f"SHA-256 {found}, not {archive.sha256}",
            remedy=f"take it from {archive.url}; what came is not kept"
            if failure is RunFailed
            else f"download {archive.url} again",
        )
