"""Pictures in chats: where they stand, and the files or bytes that they are.

A row names its pictures; only their names, or their bytes as they were stored, are kept. They are
decoded once while data are read, so that one that cannot be is told with its row, and again for
each batch.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..inputs.documents import reason, shown
from .files import kind_of

COLUMNS = ("images", "image")
"""Columns of a row that hold pictures, in the order of their places in the chat."""
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 2**26
"""A picture of more is refused before it is decoded: a small file can announce a huge one."""
MOST_BYTES = 2**28
ANYWHERE = Path("/")
"""As a root: any file, by a name that begins at the current folder."""
_PARTS = ("image", "image_url", "input_image")
_INLINE = ("image", "image_url", "url", "path", "base64", "bytes")
"""Under which names a part of a chat may hold its picture itself."""
_MARK = "<image>"
"""What stands in the texts of many data sets for a picture."""


@dataclass(frozen=True)
class Picture:
    """A picture as data name it.

    Attributes:
        path: its file; or
        data: the bytes of one.
        most: pixels that it is made smaller to before anything else; 0 leaves it as it is.
        where: the row that names it.
    """

    path: str = ""
    data: bytes = b""
    most: int = 0
    where: str = ""

    def opened(self) -> Any:
        """Return it decoded, a PIL image in RGB that stands upright. Raises DataError."""
        try:
            from PIL import Image, ImageOps, UnidentifiedImageError
        except ImportError:
            what, fix = "pictures are read with Pillow", "pip install 'quantadapt[vision]'"
            raise DataError(what, fix=fix, where=self.where) from None
        try:
            data = self._bytes()
            with Image.open(io.BytesIO(data), formats=KINDS) as file:
                width, height = file.size
                if width * height > MOST_PIXELS:
                    what = f"{self.name} has {width:,} x {height:,} pixels, which is too large"
                    fix = "make it smaller; models see a few million at most"
                    raise DataError(what, fix=fix, where=self.where)
                image = ImageOps.exif_transpose(file).convert("RGB")
        except DataError:
            raise
        except Exception as error:  # what is in the file decides what Pillow raises
            why = reason(error)
            if isinstance(error, UnidentifiedImageError):  # Pillow's words name an object of ours
                why = f"it is none of {', '.join(KINDS)}" if data else "it is empty"
            what = f"{self.name} cannot be read as a picture: {why}"
            fix = f"save it as {', '.join(KINDS[:3])}, or leave the row out"
            if isinstance(error, FileNotFoundError):  # it was there when the data were read
                fix = "put it back"
            raise DataError(what, fix=fix, where=self.where) from None
        if self.most and image.width * image.height > self.most:
            scale = (self.most / (image.width * image.height)) ** 0.5
            width, height = (max(1, int(side * scale)) for side in image.size)
            image = image.resize((width, height))
        return image

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return shown(self.path) if self.path else "a picture"

    def _bytes(self) -> bytes:
        if not self.path:
            return self.data
        file = Path(self.path)
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        return file.read_bytes()

    def stored(self) -> dict[str, Any]:
        """Return it as a data set keeps it."""
        return {"path": self.path, "bytes": self.data, "most": self.most, "where": self.where}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Picture:
        """Return what `stored` returned."""
        return cls(stored["path"], stored["bytes"], stored["most"], stored["where"])


def placed(
    turns: Sequence[Any], given: Sequence[Any], *, root: Path | None, most: int = 0, where: str
) -> Sequence[Any]:
    """Return the turns of a chat with a `Picture` in each place; see `with_pictures`.

    Args:
        given: pictures beside the chat, in the order of their places.
        root: the folder that files lie in; None where none may be named.
    """
    places = _Places(list(given), root, most, where)
    marked = bool(given) and any(_MARK in str(_content(turn)) for turn in turns)
    made = [places.filled(turn, marked) for turn in turns]
    if places.left and not places.used:  # there was no place at all
        first = next((i for i, turn in enumerate(made) if _role(turn) == "user"), None)
        if first is None:
            raise DataError("its pictures have no turn of a user to stand in", where=where)
        pictures = [places.part(value) for value in places.left]
        places.left, places.used = [], len(pictures)
        made[first] = {**made[first], "content": [*pictures, *_parts(_content(made[first]))]}
    if places.left:
        count = places.used + len(places.left)
        what = f"it has {count} pictures, and places for {places.used}"
        fix = 'write {"type": "image"} where each stands'
        raise DataError(what, fix=fix, where=where)
    return made if places.used else turns


def pictures_in(value: Any) -> list[Any]:
    """Return the pictures in a column: one, several, or none."""
    found = value if isinstance(value, list | tuple) else [value]
    return [one for one in found if one is not None and one != ""]


class _Places:
    def __init__(self, left: list[Any], root: Path | None, most: int, where: str) -> None:
        self.left, self.used, self._root, self._most, self._where = left, 0, root, most, where

    def filled(self, turn: Any, marked: bool) -> Any:
        """Return a turn with its pictures; `marked` says whether `<image>` stands for some."""
        content = _content(turn)
        if isinstance(content, str) and marked and _MARK in content:
            return {**turn, "content": [*self._of_marks(content)]}
        if not _holds_parts(turn):
            return turn
        return {**turn, "content": [self._part(part) for part in content]}

    def _of_marks(self, text: str) -> Iterator[dict[str, Any]]:
        for number, piece in enumerate(text.split(_MARK)):
            if number:
                yield self.part(self._next())
            if piece := piece.strip("\n"):
                yield {"type": "text", "text": piece}

    def _part(self, part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in _PARTS:
            return part  # text, or refused where chats are read
        if isinstance(part.get("picture"), Picture):
            return self.part(part["picture"])
        inline = next((part[name] for name in _INLINE if part.get(name) is not None), None)
        if "base64" in part and inline is part["base64"] and isinstance(inline, str):
            inline = f"data:;base64,{inline}"
        return self.part(self._next() if inline is None else inline)

    def _next(self) -> Any:
        if not self.left:
            what = f"picture {self.used + 1} of the chat is missing: the row has no more"
            raise DataError(what, fix="add it to the column images", where=self._where)
        return self.left.pop(0)

    def part(self, value: Any) -> dict[str, Any]:
        """Return the part of a turn that is a picture."""
        self.used += 1
        return {"type": "image", "picture": self._picture(value)}

    def _picture(self, value: Any) -> Picture:
        more: dict[str, Any] = {"most": self._most, "where": self._where}
        if isinstance(value, Picture):
            return value
        if hasattr(value, "convert"):  # one of Pillow's
            written = io.BytesIO()
            value.convert("RGB").save(written, "PNG")
            value = written.getvalue()
        if isinstance(value, Mapping):  # as in data sets of the hub, and in OpenAI's API
            found = next((value[n] for n in ("bytes", "url", "path") if value.get(n)), None)
            value = found if found is not None else value
        if isinstance(value, bytes | bytearray) and value:
            return Picture(data=bytes(value), **more)
        if not isinstance(value, str) or not value:
            fix = "name a file, or give the bytes of one"
            raise DataError(f"a picture is {kind_of(value)}", fix=fix, where=self._where)
        if value.startswith("data:"):
            return Picture(data=_decoded(value, self._where), **more)
        return Picture(path=str(self._file(value)), **more)

    def _file(self, name: str) -> Path:
        """Return the file called `name`. A row never leads out of the folder of its pictures."""
        if name.lower().startswith(("http://", "https://")):
            what, fix = f"{shown(name)} is an address", "download it, and name the file"
            raise DataError(what, fix=fix, where=self._where)
        if self._root is None:
            what, fix = "a picture is named by a path", "send it as a data: URL"
            raise DataError(what, fix=fix, where=self._where)
        try:
            folder = Path.cwd() if self._root == ANYWHERE else self._root
            file, root = (folder / Path(name).expanduser()).resolve(), self._root.resolve()
            inside, there = file.is_relative_to(root), file.is_file()
        except (OSError, ValueError, RuntimeError):  # no name that a file can have
            inside, there = True, False
        if not inside:
            what = f"{shown(name)} leads out of the folder of the pictures, {root}"
            fix = "put it there, or name another folder in data.image_folder"
            raise DataError(what, fix=fix, where=self._where)
        if not there:
            what = f"there is no picture {shown(name)} in {self._root}"
            fix = "check its name; data.image_folder says where pictures lie"
            raise DataError(what, fix=fix, where=self._where)
        return file


def _decoded(url: str, where: str) -> bytes:
    """Return the bytes in a `data:` URL."""
    head, comma, text = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not written as data:image/png;base64,...")
        if len(text) > MOST_BYTES:
            raise ValueError("it is too large")
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        what = f"a picture in a data: URL cannot be read: {reason(error)}"
        raise DataError(what, fix="write data:image/png;base64,...", where=where) from None


def _content(turn: Any) -> Any:
    return turn.get("content") if isinstance(turn, Mapping) else None


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _holds_parts(turn: Any) -> bool:
    content = _content(turn)
    kinds = (
        [p.get("type") for p in content if isinstance(p, Mapping)]
        if isinstance(content, list)
        else []
    )
    return any(kind in _PARTS for kind in kinds)
