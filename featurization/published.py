"""Archives that databases have published once and for all, by address and checksum.

Matbench v0.1 (Dunn et al., npj Comput. Mater. 6, 138 (2020)): addresses and SHA-256 of matminer's
`dataset_metadata.json`; the nine of its tasks that have structures. JARVIS-DFT (Choudhary et al.,
npj Comput. Mater. 6, 173 (2020)): the file of jarvis-tools' `dft_3d`; figshare publishes its size
and MD5, and the SHA-256 is that of the file with both.
"""

from dataclasses import dataclass

from featurization.crystal import ATTRIBUTION


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
