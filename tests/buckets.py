"""An object store on this machine that speaks as much of Google's and of Amazon's protocol as our libraries do.

    with serve() as buckets:
        buckets.objects["bucket/run/config.json"]       bytes
        subprocess.run(..., env=os.environ | buckets.environment)

It keeps objects in memory, by bucket and name, and checks no signatures.
"""

from collections.abc import Iterator
import contextlib
import email.parser
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
import json
import re
import threading
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000  # names in one answer to a listing


class Buckets:
    """The objects, and what a program must know to find them."""

    def __init__(self, port: int):
        self.objects: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.uploads: dict[str, Any] = {}
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self._count = 0
        url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GCS": '{"token": "anon", "use_listings_cache": false}', "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true",
        }  # fmt: skip

    def count(self) -> int:
        with self.lock:
            self._count += 1
            return self._count

    def put(self, key: str, value: bytes) -> None:
        with self.lock:
            self.objects[key], self.versions[key] = value, self.count()

    def remove(self, key: str) -> bool:
        with self.lock:
            self.versions.pop(key, None)
            return self.objects.pop(key, None) is not None

    def clear(self) -> None:
        for key in list(self.objects):
            self.remove(key)

    def listing(self, bucket: str, prefix: str, delimiter: str, after: str) -> tuple[list[str], list[str], str]:
        """Names and folders below a prefix, and where the next page begins ("" for none)."""
        names, folders = [], []
        for key in sorted(k for k in list(self.objects) if k.startswith(f"{bucket}/{prefix}")):
            name = key.removeprefix(f"{bucket}/")
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            folder = prefix + head + cut
            if name <= after or (cut and (folder <= after or folder in folders)):
                continue
            if len(names) + len(folders) == PAGE:
                return names, folders, max([*names, *folders])
            (folders if cut else names).append(folder if cut else name)
        return names, folders, ""


class Handler(BaseHTTPRequestHandler):
    """One connection. What begins with one of Google's paths is Google's, all else Amazon's."""

    protocol_version = "HTTP/1.1"
    buckets: Buckets

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed, or has read enough
            super().handle()

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        body = self._body()
        self.buckets.requests.append(f"{self.command} {self.path}")
        google = re.match(r"/(upload/|download/|batch/|resumable)?(storage/v1)?", url.path)
        with self.buckets.lock:
            if google and google[0] not in ("/", ""):
                self._google(url.path, body)
            else:
                bucket, _, name = unquote(url.path).lstrip("/").partition("/")
                self._amazon(bucket, name, body)
        self._send(*self.answer)  # without the lock: a client that does not read must not stop the others

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "") == "chunked":
            return self._chunks(self.rfile)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "aws-chunked" in self.headers.get("content-encoding", ""):
            return self._chunks(io.BytesIO(body))
        return body

    @staticmethod
    def _chunks(stream: Any) -> bytes:
        found = b""
        while size := int(stream.readline().split(b";")[0] or b"0", 16):
            found += stream.read(size)
            stream.readline()
        while stream.readline().strip():  # trailers
            pass
        return found

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.answer = (status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _part(self, value: bytes) -> tuple[int, bytes, dict[str, str]]:
        """What a Range asks for: status, bytes, headers."""
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("range", ""))
        if not asked:
            return 200, value, {}
        first, last = asked.groups()
        start = int(first) if first else max(0, len(value) - int(last))
        end = min(int(last) + 1, len(value)) if last and first else len(value)
        if start >= len(value) and start:
            return 416, b"", {"content_range": f"bytes */{len(value)}"}
        return 206, value[start:end], {"content_range": f"bytes {start}-{end - 1}/{len(value)}"}

    # Amazon's.

    def _tag(self, key: str) -> str:
        return f'"{hashlib.md5(self.buckets.objects[key]).hexdigest()}-{self.buckets.versions[key]}"'

    def _amazon(self, bucket: str, name: str, body: bytes) -> None:
        buckets, query, key = self.buckets, self.query, f"{bucket}/{name}"
        if not name:
            return self._amazon_bucket(bucket, body)
        if self.command == "PUT" and "partNumber" in query:
            buckets.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return self._answer(200, etag='"part"')
        if self.command == "POST" and "uploads" in query:
            upload = str(buckets.count())
            buckets.uploads[upload] = {}
            return self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if self.command == "POST" and "uploadId" in query:
            parts = buckets.uploads.pop(query["uploadId"])
            buckets.put(key, b"".join(parts[number] for number in sorted(parts)))
            return self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(self._tag(key))}</ETag>")
        if self.command == "PUT":
            match, none = self.headers.get("if-match"), self.headers.get("if-none-match")
            there = key in buckets.objects
            if (match and (not there or match != self._tag(key))) or (none and there):
                return self._error(412, "PreconditionFailed")
            if source := self.headers.get("x-amz-copy-source"):
                source = unquote(source).lstrip("/").partition("?")[0]
                if source not in buckets.objects:
                    return self._error(404, "NoSuchKey")
                buckets.put(key, buckets.objects[source])
                return self._xml("CopyObjectResult", f"<ETag>{escape(self._tag(key))}</ETag>")
            buckets.put(key, body)
            return self._answer(200, etag=self._tag(key))
        if self.command == "DELETE":
            buckets.remove(key)
            return self._answer(204)
        if key not in buckets.objects:
            return self._error(404, "NoSuchKey")
        match, none = self.headers.get("if-match"), self.headers.get("if-none-match")
        if match and match != self._tag(key):
            return self._error(412, "PreconditionFailed")
        if none == self._tag(key):
            return self._answer(304, etag=none)
        status, part, headers = self._part(buckets.objects[key])
        headers |= dict(etag=self._tag(key), last_modified="Wed, 01 Jan 2025 00:00:00 GMT")
        self._answer(status, part, **headers)

    def _amazon_bucket(self, bucket: str, body: bytes) -> None:
        query = self.query
        if self.command == "POST" and "delete" in query:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.buckets.remove(f"{bucket}/{name}")
            return self._xml("DeleteResult", "")
        if self.command in ("PUT", "HEAD") or "location" in query:
            return self._answer(200)
        after = query.get("continuation-token", query.get("start-after", ""))
        names, folders, then = self.buckets.listing(bucket, query.get("prefix", ""), query.get("delimiter", ""), after)
        shown = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.buckets.objects[f'{bucket}/{name}'])}</Size>"
            f"<ETag>{escape(self._tag(f'{bucket}/{name}'))}</ETag>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for name in names
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        more = f"<NextContinuationToken>{escape(then)}</NextContinuationToken>" if then else ""
        self._xml(
            "ListBucketResult",
            f"<Name>{bucket}</Name><KeyCount>{len(names) + len(folders)}</KeyCount>"
            f"<IsTruncated>{str(bool(then)).lower()}</IsTruncated>{more}{shown}",
        )

    def _xml(self, name: str, inner: str, status: int = 200) -> None:
        space = "" if name == "Error" else ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name}{space}>{inner}</{name}>'
        self._answer(status, text.encode(), content_type="application/xml")

    def _error(self, status: int, code: str) -> None:
        self._xml("Error", f"<Code>{code}</Code><Message>{code}</Message>", status)

    # Google's.

    def _google(self, path: str, body: bytes) -> None:
        if path.startswith("/batch"):
            return self._batch(body)
        if path.startswith("/resumable"):
            return self._resumable(body)
        status, found, raw = self._call(self.command, path, self.query, body)
        if raw is not None:
            code, part, headers = self._part(raw)
            return self._answer(code, part, **headers, **found)
        if "location" in found:
            return self._answer(status, b"", location=found["location"])
        self._answer(status, json.dumps(found).encode() if found else b"", content_type="application/json")

    def _call(
        self, method: str, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, Any], bytes | None]:
        """One request of the JSON API: status, answer, and the bytes of an object that was asked for."""
        buckets = self.buckets
        at = re.match(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?$", path)
        if not at:
            return 404, self._wrong(404), None
        bucket, name = unquote(at[2]), unquote(at[3] or "")
        if at[1] == "upload/":
            return self._upload(bucket, query, body)
        if "/o" not in path[len("/storage/v1/b/") :]:
            return 200, dict(kind="storage#bucket", id=bucket, name=bucket), None
        if not name:
            names, folders, then = buckets.listing(
                bucket, query.get("prefix", ""), query.get("delimiter", ""),
                query.get("pageToken", "") or _before(query.get("startOffset", "")),
            )  # fmt: skip
            if until := query.get("endOffset"):
                names, folders = [n for n in names if n < until], [f for f in folders if f < until]
            answer = dict(kind="storage#objects", items=[self._about(bucket, n) for n in names], prefixes=folders)
            return 200, answer | (dict(nextPageToken=then) if then else {}), None
        if copied := re.match(r"(.+)/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/(.+)$", at[3]):
            source, target = f"{bucket}/{unquote(copied[1])}", f"{unquote(copied[3] or bucket)}/{unquote(copied[4])}"
            if source not in buckets.objects:
                return 404, self._wrong(404), None
            buckets.put(target, buckets.objects[source])
            about = self._about(*target.split("/", 1))
            if copied[2] == "moveTo":
                buckets.remove(source)
                return 200, about, None
            return 200, dict(kind="storage#rewriteResponse", done=True, resource=about), None
        key = f"{bucket}/{name}"
        version = str(buckets.versions.get(key, 0))
        if query.get("ifGenerationMatch", version) != version:
            return 412, self._wrong(412), None
        if query.get("ifGenerationNotMatch") == version:
            return 304, {}, None
        if key not in buckets.objects:
            return 404, self._wrong(404), None
        if method == "DELETE":
            buckets.remove(key)
            return 204, {}, None
        if query.get("alt") == "media":
            return 200, {"x_goog_generation": version}, buckets.objects[key]
        return 200, self._about(bucket, name), None

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, Any], None]:
        kind, name, buckets = query["uploadType"], query.get("name", ""), self.buckets
        if kind == "multipart":
            head = b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n"
            about, content = email.parser.BytesParser().parsebytes(head + body).get_payload()
            name, body = json.loads(about.get_payload(decode=True))["name"], content.get_payload(decode=True)
        if kind == "resumable":
            upload = str(buckets.count())
            buckets.uploads[upload] = [f"{bucket}/{name or json.loads(body)['name']}", b""]
            host = self.headers["host"]
            return 200, dict(location=f"http://{host}/resumable?upload_id={upload}"), None
        key = f"{bucket}/{name}"
        if query.get("ifGenerationMatch", "") not in ("", str(buckets.versions.get(key, 0))):
            return 412, self._wrong(412), None
        buckets.put(key, body)
        return 200, self._about(bucket, name), None

    def _resumable(self, body: bytes) -> None:
        key, before = self.buckets.uploads[self.query["upload_id"]]
        whole = before + body
        total = self.headers.get("content-range", "*").rpartition("/")[2]
        if total != "*" and int(total) == len(whole):
            self.buckets.put(key, whole)
            return self._answer(200, json.dumps(self._about(*key.split("/", 1))).encode())
        self.buckets.uploads[self.query["upload_id"]][1] = whole
        self._answer(308, range=f"bytes=0-{len(whole) - 1}")

    def _batch(self, body: bytes) -> None:
        """Several requests in one, which is how a folder is removed."""
        head = b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n"
        answers = []
        for part in email.parser.BytesParser().parsebytes(head + body).get_payload():
            method, url, _ = part.get_payload().split("\n")[0].split(" ", 2)
            path = urlsplit(url.strip())
            status, found, _ = self._call(method, path.path, {}, b"")
            text = json.dumps(found) if found else ""
            number = part["content-id"].strip("<>")
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(text)}\r\n\r\n{text}\r\n"
            )
        text = "".join(answers) + "--batch--\r\n"
        self._answer(200, text.encode(), content_type='multipart/mixed; boundary="batch"')

    def _about(self, bucket: str, name: str) -> dict[str, Any]:
        value, time = self.buckets.objects[f"{bucket}/{name}"], "2025-01-01T00:00:00.000Z"
        version = str(self.buckets.versions[f"{bucket}/{name}"])
        return dict(
            kind="storage#object", bucket=bucket, name=name, id=f"{bucket}/{name}/{version}", size=str(len(value)),
            generation=version, metageneration="1", updated=time, timeCreated=time, etag=version,
        )  # fmt: skip

    @staticmethod
    def _wrong(status: int) -> dict[str, Any]:
        return dict(error=dict(code=status, message=f"status {status}"))


def _before(name: str) -> str:
    """The greatest name that is less than this one, or near enough."""
    return name[:-1] + chr(ord(name[-1]) - 1) + "\U0010ffff" if name else ""


@contextlib.contextmanager
def serve() -> Iterator[Buckets]:
    """An empty object store, until the end of the block."""
    handler = type("Served", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    buckets = handler.buckets = Buckets(server.server_address[1])  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield buckets
    finally:
        server.shutdown()
        server.server_close()
