"""Images where they lie: in a folder, a .zip or a paper's .tar.gz, each with everything that can be wrong with it."""

import io
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from biod2c.dataset_builder.report import BadRowError, SourceError
from biod2c.dataset_builder.sources import archives, raw
from biod2c.dataset_builder.sources.archives import MemberError, ZipImages, open_images, read_packed_image
from biod2c.dataset_builder.sources.raw import ImageFolder


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def refusal(images, name):
    """Why an image is refused."""
    with pytest.raises(BadRowError) as error:
        images.read(name)
    assert (error.value.field, error.value.found) == ("image", name)
    return error.value.expected


def test_a_zip_gives_images_by_name_whatever_their_folder(tmp_path, make_jpeg):
    members = [("__MACOSX/images/._a.jpg", b"x"), ("images/a.jpg", make_jpeg(1)), ("b.jpg", make_jpeg(2))]
    images = ZipImages(zipped(tmp_path / "images.zip", members), "image")
    assert [images.read(name).data for name in ("a.jpg", "b.jpg", "images/a.jpg")] == [
        make_jpeg(1),
        make_jpeg(2),
        make_jpeg(1),
    ]
    assert "none by that name" in refusal(images, "c.jpg")
    assert list(tmp_path.iterdir()) == [tmp_path / "images.zip"]  # nothing was unpacked


def test_a_zip_never_leads_out_of_itself(tmp_path, make_jpeg):
    link = zipfile.ZipInfo("images/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    evil = [("../../evil.jpg", make_jpeg(1)), ("/root.jpg", make_jpeg(1)), ("..\\back.jpg", make_jpeg(1))]
    members = [*evil, ("../good.jpg", make_jpeg(1)), ("images/good.jpg", make_jpeg(2)), (link, "/etc/passwd")]
    images = ZipImages(zipped(tmp_path / "images.zip", members), "image")
    assert "leads out" in refusal(images, "evil.jpg")
    assert "leads out" in refusal(images, "root.jpg")
    assert "a name inside images.zip" in refusal(images, "../../evil.jpg")
    assert "a name inside images.zip" in refusal(images, "/root.jpg")
    assert "a name inside images.zip" in refusal(images, "..\\back.jpg")
    assert "a link" in refusal(images, "link.jpg")
    assert images.read("good.jpg").data == make_jpeg(2)


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path, make_jpeg, monkeypatch):
    bomb = ("bomb.jpg", bytes(8 * 2**20))
    members = [bomb, ("a.jpg", make_jpeg(1)), ("blank.bmp", bytes(2**20))]
    images = ZipImages(zipped(tmp_path / "images.zip", members, zipfile.ZIP_DEFLATED), "image")
    tracemalloc.start()
    assert "a bomb?" in refusal(images, "bomb.jpg")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert images.read("a.jpg").data == make_jpeg(1)
    monkeypatch.setattr(archives, "LARGEST_IMAGE", 2**20)
    big = ZipImages(zipped(tmp_path / "big.zip", [("big.jpg", bytes(2**20 + 1))]), "image")
    assert "a bomb?" in refusal(big, "big.jpg")
    assert "decodes" in refusal(images, "blank.bmp")  # a small one is unpacked, and then no image


def test_a_zip_whose_directory_understates_a_size_gives_no_more_than_that(tmp_path):
    path = zipped(tmp_path / "images.zip", [("a.jpg", bytes(2**24))], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<L", 2**24), struct.pack("<L", 1000)))
    assert "CRC" in refusal(ZipImages(path, "image"), "a.jpg")


def test_a_damaged_member_is_its_rows_error_and_a_cut_archive_the_sources(tmp_path, make_jpeg):
    path = zipped(tmp_path / "images.zip", [("a.jpg", make_jpeg(1)), ("b.jpg", make_jpeg(2))])
    data = path.read_bytes()
    at = data.index(make_jpeg(1)) + 100
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    images = ZipImages(path, "image")
    assert "CRC" in refusal(images, "a.jpg")
    assert images.read("b.jpg").data == make_jpeg(2)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"images\.zip: not a whole zip archive .*fetch the file again"):
        ZipImages(path, "image")


def test_the_unpacked_folder_comes_before_the_zip(tmp_path, make_jpeg):
    zipped(tmp_path / "images.zip", [("images/a.jpg", make_jpeg(1))])
    assert open_images(tmp_path, ["images"], "images.zip", "image").read("a.jpg").data == make_jpeg(1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(make_jpeg(2))
    assert open_images(tmp_path, ["images"], "images.zip", "image").read("a.jpg").data == make_jpeg(2)
    with pytest.raises(SourceError, match=r"no images; expected b\.zip or its content in b"):
        open_images(tmp_path, ["b"], "b.zip", "image")


def test_a_folder_refuses_what_is_not_an_image_in_it(tmp_path, make_jpeg):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(make_jpeg(1))
    (tmp_path / "images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    images = ImageFolder(tmp_path / "images", "image")
    assert {refusal(images, name) for name in ("../secret.jpg", "/etc/passwd", "link.jpg")} == {"a name inside images/"}
    assert "an image file in images/" in refusal(images, "a" * 300 + ".jpg")


def test_only_the_last_images_stay_in_memory(tmp_path, make_jpeg, monkeypatch):
    names = [f"{n}.jpg" for n in range(6)]
    path = zipped(tmp_path / "images.zip", [*((name, make_jpeg(7)) for name in names), ("bad.jpg", b"x")])
    images = ZipImages(path, "image")
    monkeypatch.setattr(raw, "RECENT_BYTES", 3 * (len(make_jpeg(7)) + 1000))
    asked = []
    find = images.find
    monkeypatch.setattr(images, "find", lambda name: asked.append(name) or find(name))
    for name in [*names, "5.jpg", "4.jpg", "3.jpg", "2.jpg", "5.jpg"]:
        images.read(name)
    assert asked == [
        *names,
        "2.jpg",
        "5.jpg",
    ]  # 5, 4 and 3 were held; 2 put out 5, which had not been asked for longest
    for _ in range(2):
        refusal(images, "bad.jpg")
    assert asked[-1] == "bad.jpg" and asked.count("bad.jpg") == 1


def package(path, members):
    """A paper's package; a member's data may be a ready TarInfo."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def link_to(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_a_figure_comes_out_of_its_papers_package(tmp_path, make_jpeg):
    text = b"<article/>" * 1000
    path = package(tmp_path / "PMC1.tar.gz", [("PMC1/a.nxml", text), ("./PMC1/a.jpg", make_jpeg(1))])
    assert read_packed_image(path, "PMC1/a.jpg") == make_jpeg(1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_package_that_is_missing_cut_or_links_elsewhere_is_refused(tmp_path, make_jpeg):
    members = [
        ("PMC1/a.jpg", link_to("PMC1/a.jpg", "/etc/passwd", tarfile.SYMTYPE)),
        ("PMC1/b.jpg", link_to("PMC1/b.jpg", "../../b.jpg", tarfile.LNKTYPE)),
        ("../c.jpg", make_jpeg(1)),
        ("PMC1/d.jpg", make_jpeg(2)),
    ]
    path = package(tmp_path / "PMC1.tar.gz", members)

    def why(name):
        with pytest.raises(MemberError) as error:
            read_packed_image(path, name)
        assert str(tmp_path) not in str(error.value)  # a report says the same on every machine
        return str(error.value)

    assert [why(f"PMC1/{name}.jpg") for name in "abe"] == ["a link or folder", "a link or folder", "none by that name"]
    assert [why(name) for name in ("../c.jpg", "/etc/passwd")] == ["a name that leads out of the archive"] * 2
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "ended" in why("PMC1/d.jpg")
    path.write_bytes(b"<html>404</html>")
    assert "Not a gzipped file" in why("PMC1/d.jpg")
    path.unlink()
    assert "No such file" in why("PMC1/d.jpg")


def test_package_bombs_are_refused(tmp_path, make_jpeg, monkeypatch):
    path = package(tmp_path / "PMC1.tar.gz", [("PMC1/bomb", bytes(64 * 2**20)), ("PMC1/a.jpg", make_jpeg(1))])
    tracemalloc.start()
    with pytest.raises(MemberError, match="a bomb"):
        read_packed_image(path, "PMC1/a.jpg")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    monkeypatch.setattr(archives, "LARGEST_IMAGE", len(make_jpeg(1)) - 1)
    path = package(tmp_path / "PMC2.tar.gz", [("PMC2/a.jpg", make_jpeg(1))])
    with pytest.raises(MemberError, match="a bomb"):
        read_packed_image(path, "PMC2/a.jpg")
