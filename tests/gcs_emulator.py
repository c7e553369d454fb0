"""Serves an empty bucket by GCS's protocol at the port given as the argument, from memory.

It is gcp-storage-emulator, except for one fault: that reads uploads as email and so loses the carriage return that one
file in 256 ends with. Files called DAMAGED_ON_THE_WAY arrive with another last byte, as by a faulty network.
"""

import json
import re
import sys

DAMAGED_ON_THE_WAY = "damaged_on_the_way"


def parts(body: bytes, boundary: bytes) -> tuple[dict, bytes, str]:
    """Returns a file's metadata, content and content type from the body of an upload (RFC 2387), byte for byte."""
    line = b"--" + boundary
    end = b"\r\n" if body.startswith(line + b"\r\n") else b"\n"  # gcsfs writes the latter
    _, meta, rest = body.split(line + end, 2)
    content = rest[: rest.rindex(end + line + b"--")]
    head, _, content = content.partition(end + end)
    kind = re.search(rb"(?i)content-type: *([^\s;]+)", head)
    return json.loads(meta.partition(end + end)[2]), content, kind[1].decode()


def read_upload(handler, query, original):
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return original(handler, query)
    body = handler.rfile.read(int(handler.headers["Content-Length"]))
    boundary = re.search(r"boundary=\"?([^\";]+)", kind)[1].encode()
    meta, content, content_type = parts(body, boundary)
    if meta["name"].endswith(DAMAGED_ON_THE_WAY):
        content = content[:-1] + bytes([content[-1] ^ 1])
    return {"meta": meta, "content": content, "content-type": content_type}


def main(port):
    from gcp_storage_emulator import server

    original = server._read_data
    server._read_data = lambda handler, query: read_upload(handler, query, original)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
