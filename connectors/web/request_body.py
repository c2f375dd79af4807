"""Read the JSON body of a request, of bounded size. Files in it, such as pictures, are dropped as they arrive.

Clients send the whole history with each question, so one large picture would have every later request refused.
"""

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request

LARGEST_BODY = 2_000_000  # bytes, without files
LARGEST_UPLOAD = 2**26  # bytes, with files
# A file: a base64 value under one of these keys. Inside a text the quotes are escaped, so nothing matches there.
_FILE = re.compile(rb'("(?:url|image_url|data|file_data)"\s{0,9}:\s{0,9}")(?:[A-Za-z0-9+/=_:;,.-]|\\/){256,}')
_BEGINNING = 512  # bytes; longer than the shortest match, so that a file is also found across two pieces


async def read_json(request: Request) -> bytes:
    """Return the body of a JSON request, without files. Raises HTTPException: 413 if too large, 415 if not JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send Content-Type: application/json")  # a page of another site cannot do this
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
