"""The npm packages that the training pictures and their names come from: pinned, licence checked.

Nothing is downloaded with the library. `fetch_packages` gets the archives through the npm client into a
folder, `Archive` reads one and refuses it where it states another licence than the one recorded here.
"""

import json
import shutil
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGES", "STYLES", "Archive", "DataError", "Package", "fetch_packages"]


class DataError(RuntimeError):
    """The training data cannot be had or read; the message says what is wrong and what helps."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package and the licence that it must state."""

    name: str
    version: str
    licence: str
    style: str | None  # the caption word of its art; None for names and tags

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "noto"),
    Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "blob"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "flat"),
    Package("@iconify-json/fluent-emoji", "1.2.7", "MIT", "fluent"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "3d"),
    Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "fx"),
    Package("emojibase-data", "17.0.0", "MIT", None),
)
STYLES = tuple(p.style for p in PACKAGES if p.style)


def fetch_packages(folder: Path) -> None:
    """Puts every archive of PACKAGES that is not there yet into `folder`, through `npm pack`."""
    missing = [p for p in PACKAGES if not (folder / p.archive).exists()]
    if not missing:
        return
    names = " ".join(f"{p.name}@{p.version}" for p in missing)
    by_hand = f"run `npm pack {names}` in {folder}"
    if shutil.which("npm") is None:
        raise DataError(
            f"training data: npm is needed to fetch the emoji packages; install Node.js, or {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", *names.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    still = [p.archive for p in missing if not (folder / p.archive).exists()]
    if done.returncode or still:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"training data: npm could not fetch the emoji packages ({reason}); {by_hand}")


class Archive:
    """The files of one npm archive, after its licence has been checked."""

    def __init__(self, folder: Path, package: Package):
        self.path = path = folder / package.archive
        try:
            with tarfile.open(path, "r:gz") as tar:
                members = [m for m in tar if m.isfile()]
                self.files = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise DataError(f"{path}: a complete npm archive was required ({error}); fetch it anew") from None
        stated = self.json("package.json").get("license")
        info = self.json("info.json") if "info.json" in self.files else {}
        art = info.get("license", {}).get("spdx", package.licence)
        if stated != package.licence or art != package.licence:
            raise DataError(
                f"{package.name}: licence {package.licence} was expected, the package states {stated}/{art}"
            )

    def json(self, path: str):
        """The parsed JSON file at `path`; DataError where the archive has none."""
        if path not in self.files:
            raise DataError(f"{self.path}: a package with {path} was required; fetch it anew")
        return json.loads(self.files[path])
