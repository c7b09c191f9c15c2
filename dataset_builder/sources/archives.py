"""Images that stay in the archives they were published in: a .zip beside the table, one .tar.gz for each PMC paper.

Nothing is unpacked to disk, so no name in an archive can lead anywhere; a name with "..", an absolute one and a link
are refused all the same, because no published image has one. What comes out is limited: a member's declared size before
it is read, its compression against bombs, and for a .tar.gz, which has to be unpacked from its beginning, all that was
unpacked on the way. A member that cannot be read is an error of its rows; an archive without its directory (a cut .zip)
is one of the source.
"""

import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..report import SourceError
from .raw import ImageFolder, Images, reason

LARGEST_IMAGE = 256 * 2**20  # bytes of one image file
LARGEST_PACKAGE = 2 * 2**30  # bytes unpacked of one paper's .tar.gz
LARGEST_RATIO = 200  # unpacked to packed; images and texts of papers stay under 20
SMALL = 2**20  # bytes that are no bomb whatever their ratio: a blank bitmap packs a thousandfold

UNREADABLE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, struct.error, ValueError),  # zipfile's for encrypted members, cut headers and nonsense in them
)


class MemberError(ValueError):
    """A member of an archive that is not there or not to be read; the message says why."""


def open_images(root: Path, folders: Sequence[str], archive: str, field: str) -> Images:
    """The first of `folders` under `root` that is there, else the .zip file `archive`. SourceError without either."""
    for name in folders:
        if (root / name).is_dir():
            return ImageFolder(root / name, field)
    if (root / archive).is_file():
        return ZipImages(root / archive, field)
    raise SourceError(f"{root}: no images; expected {archive} or its content in {' or '.join(folders)}")


def is_inside(name: str) -> bool:
    """Whether a member's name stays below the folder it would be unpacked to, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and not re.match("[A-Za-z]:", name)


class ZipImages(Images):
    """Images in a .zip file, by their names in whatever folder they have in it."""

    def __init__(self, archive: Path, field: str) -> None:
        """Reads the archive's directory: about 0.7 KB of memory a member. SourceError if it has none."""
        super().__init__(field)
        self.archive = archive
        try:
            self._zip = zipfile.ZipFile(archive)
        except UNREADABLE as error:
            raise SourceError(f"{archive}: not a whole zip archive ({reason(error)}); fetch the file again") from error
        folders = {name[: name.rfind("/") + 1] for name in self._zip.NameToInfo}
        self._folders = sorted(folders, key=lambda folder: (not is_inside(folder), folder))

    def find(self, name: str) -> bytes:
        """The member's bytes; BadRowError if it is missing, unsafe or damaged."""
        if not is_inside(name):
            raise self.bad(name, f"a name inside {self.archive.name}", "mend the row in the file")
        try:
            return self._read(self._member(name))
        except MemberError as error:
            raise self.bad(name, f"an image in {self.archive.name} ({error})", "fetch the archive again") from error

    def _member(self, name: str) -> zipfile.ZipInfo:
        for folder in self._folders:
            member = self._zip.NameToInfo.get(folder + name)
            if member is not None:
                return member
        raise MemberError("none by that name")

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        if not is_inside(member.filename):
            raise MemberError(f"its only one is {member.filename!r}, which leads out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise MemberError("a link")
        check_size(member.file_size, member.compress_size)
        try:
            return self._zip.read(member)  # zipfile stops at the declared size and then compares the checksum
        except UNREADABLE as error:
            raise MemberError(reason(error)) from error


def check_size(unpacked: int, packed: int) -> None:
    """MemberError for sizes that no image has."""
    if unpacked > LARGEST_IMAGE or unpacked > max(SMALL, LARGEST_RATIO * packed):
        raise MemberError(f"{packed} bytes that unpack to {unpacked}: a bomb?")


def read_packed_image(package: Path, name: str) -> bytes:
    """The bytes of the member `name` of a paper's .tar.gz. MemberError if it is missing, a link or not to be read."""
    if not is_inside(name):
        raise MemberError("a name that leads out of the archive")
    try:
        with gzip.open(package) as unpacked:
            return _read_member(_Limited(unpacked, package.stat().st_size), name)
    except UNREADABLE as error:
        raise error if isinstance(error, MemberError) else MemberError(reason(error)) from error


class _Limited(io.RawIOBase):
    """A package's unpacked bytes, up to a limit: tarfile reads whatever a header asks for."""

    def __init__(self, unpacked: gzip.GzipFile, packed: int) -> None:
        self._unpacked = unpacked
        self._packed, self._left = packed, min(LARGEST_PACKAGE, max(SMALL, LARGEST_RATIO * packed))

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; MemberError past the limit."""
        data = self._unpacked.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise MemberError(f"{self._packed} bytes that unpack to too many: a bomb?")
        return data


def _read_member(stream: _Limited, name: str) -> bytes:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if PurePosixPath(member.name) != PurePosixPath(name):
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise MemberError("a link or folder")
            check_size(member.size, member.size)  # its ratio is the whole package's, which the stream watches
            return content.read()
    raise MemberError("none by that name")
