import pytest

from rfkernels.train import packages
from rfkernels.train.packages import PACKAGES, Archive, DataError
from tests.train.archives import write_archive, write_packages


def test_packages_state_permissive_licences_and_styles_are_single_words():
    assert {p.licence for p in PACKAGES} == {"Apache-2.0", "MIT"}
    assert packages.STYLES == ("noto", "blob", "flat", "fluent", "3d", "fx")
    assert len({p.archive for p in PACKAGES}) == len(PACKAGES)


def test_archive_reads_files_and_json(tmp_path):
    files = {"package.json": {"license": "Apache-2.0"}, "a/b.txt": b"text"}
    write_archive(tmp_path / PACKAGES[0].archive, files)
    archive = Archive(tmp_path, PACKAGES[0])
    assert archive.files["a/b.txt"] == b"text" and archive.json("package.json") == {"license": "Apache-2.0"}


@pytest.mark.parametrize("stated", ["package.json", "info.json"])
def test_other_licence_is_refused(tmp_path, stated):
    files = {"package.json": {"license": "Apache-2.0"}, "info.json": {"license": {"spdx": "Apache-2.0"}}}
    files[stated] = {"license": "CC-BY-SA-4.0" if stated == "package.json" else {"spdx": "CC-BY-SA-4.0"}}
    write_archive(tmp_path / PACKAGES[0].archive, files)
    with pytest.raises(DataError, match=r"Apache-2\.0 was expected.*CC-BY-SA"):
        Archive(tmp_path, PACKAGES[0])


@pytest.mark.parametrize("damage", [lambda raw: raw[:200], lambda raw: b"no archive", lambda raw: b""])
def test_damaged_archive_says_to_fetch_it_anew(tmp_path, damage):
    write_packages(tmp_path)
    path = tmp_path / PACKAGES[0].archive
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        DataError, match=r"noto-1.2.9.tgz: a complete npm archive was required.*fetch it anew"
    ):
        Archive(tmp_path, PACKAGES[0])


def test_archive_without_its_package_file_is_refused(tmp_path):
    write_archive(tmp_path / PACKAGES[0].archive, {"readme": b""})
    with pytest.raises(DataError, match=r"noto-1.2.9.tgz: a package with package.json was required"):
        Archive(tmp_path, PACKAGES[0])


def test_archives_that_are_there_are_not_fetched(tmp_path, monkeypatch):
    write_packages(tmp_path)
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("npm was run"))
    packages.fetch_packages(tmp_path)


def test_missing_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"npm is needed.*npm pack @iconify-json/noto@1.2.9"):
        packages.fetch_packages(tmp_path)


def test_failing_npm_says_what_to_do_and_asks_for_the_missing_ones_only(tmp_path, monkeypatch):
    write_packages(tmp_path)
    (tmp_path / PACKAGES[1].archive).unlink()
    asked = []
    done = packages.subprocess.CompletedProcess([], 1, "", "npm error code E404\nnpm error not found\n")
    monkeypatch.setattr(packages.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **k: asked.extend(command) or done)
    with pytest.raises(DataError, match=r"npm error not found.*npm pack"):
        packages.fetch_packages(tmp_path)
    assert asked == ["npm", "pack", "--silent", "@iconify-json/noto-v1@1.2.5"]
