"""The body of a JSON request, of bounded size. What is not read of it, such as a picture, is dropped as it arrives.

Clients send the whole history with each question, so that one large picture would be refused again and again.
"""

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request

LARGEST_BODY = 2_000_000  # bytes, without files
LARGEST_UPLOAD = 2**26  # bytes, with them
# The value of a key that holds a file, in base64. Inside a text its quotes would be escaped, and nothing is dropped.
_FILE = re.compile(rb'("(?:url|image_url|data|file_data)"\s{0,9}:\s{0,9}")(?:[A-Za-z0-9+/=_:;,.-]|\\/){256,}')
_BEGINNING = 512  # bytes: longer than what a file's value begins with, so that it is known again in the next piece


async def read_json(request: Request) -> bytes:
    """Read the body of a JSON request. Raises HTTPException (413, 415)."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send Content-Type: application/json")  # which a page of another site cannot
    kept, received = bytearray(), 0
    async for piece in request.stream():
        received += len(piece)
        start = max(0, len(kept) - _BEGINNING)
        kept[start:] = _FILE.sub(rb"\1", bytes(kept[start:]) + piece)
        if len(kept) > LARGEST_BODY or received > LARGEST_UPLOAD:
            raise HTTPException(
                413, f"the body is larger than {LARGEST_BODY} bytes, or than {LARGEST_UPLOAD} with its files; send less"
            )
    return bytes(kept)
