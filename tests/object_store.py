"""An object store for tests: the parts of Google Cloud Storage's JSON API that gcsfs and TensorStore use, in memory.

python tests/object_store.py PORT [FILE]

With FILE, every change is appended to it before it is confirmed, and a new server continues with what is in it.
With POST /faults and {"share": 0.05, "seed": 0}, so large a share of the requests fails: 429, 503, or a connection that
is closed: after half of what is read, or after a change without confirming it. "seconds" delays every request; "forbid"
answers requests with 403 whose URL contains this text. The answer, and that of GET /faults, has the numbers of requests
so far, and of those that failed.
"""

import base64
import email.parser
import hashlib
import http.server
import itertools
import json
import pickle
import random
import re
import sys
import threading
import time
import urllib.parse


class Store:
    """Objects by (bucket, name): (generation, content). Generations start at 1."""

    def __init__(self):
        self.objects, self.uploads, self.lock = {}, {}, threading.RLock()
        self.generations, self.numbers = itertools.count(1), itertools.count(1)
        self.faults, self.failed, self.journal = (0.0, random.Random(0)), 0, None
        self.requests, self.seconds, self.forbid = 0, 0.0, ""

    def open_journal(self, path):
        """Reads the changes of an earlier server, and appends those of this one."""
        self.journal = open(path, "a+b")
        self.journal.seek(0)
        end = 0
        try:
            while True:
                table, key, value = pickle.load(self.journal)
                vars(self)[table].pop(key, None) if value is None else vars(self)[table].update({key: value})
                end = self.journal.tell()
        except (EOFError, pickle.UnpicklingError):  # the end, or a change that a kill cut off
            self.journal.truncate(end)
        self.generations = itertools.count(1 + max((g for g, _ in self.objects.values()), default=0))
        self.numbers = itertools.count(1 + max(map(int, self.uploads), default=0))

    def change(self, table, key, value):
        """Sets or, with None, removes an entry of `objects` or `uploads`."""
        with self.lock:
            if self.journal:
                pickle.dump((table, key, value), self.journal)
                self.journal.flush()
            vars(self)[table].pop(key, None) if value is None else vars(self)[table].update({key: value})

    def put(self, bucket, name, content, wanted):
        with self.lock:
            now = self.objects.get((bucket, name), (0, b""))[0]
            if wanted is not None and int(wanted) != now:
                return None
            self.change("objects", (bucket, name), (next(self.generations), content))
            return self.about(bucket, name)

    def about(self, bucket, name):
        generation, content = self.objects[bucket, name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        found = dict(kind="storage#object", name=name, bucket=bucket, generation=str(generation), metageneration="1")
        moment = f"2026-01-01T00:00:{generation % 60:02d}.{generation:06d}Z"
        return found | dict(size=str(len(content)), md5Hash=md5, etag=md5, updated=moment, timeCreated=moment)


STORE = Store()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Says nothing."""

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut = False
        if url.path == "/faults":
            if self.command == "POST":
                given = json.loads(self.body)
                STORE.faults = (given.get("share", 0.0), random.Random(given.get("seed", 0)))
                STORE.seconds, STORE.forbid = given.get("seconds", 0.0), given.get("forbid", "")
            return self.reply(200, {"failed": STORE.failed, "requests": STORE.requests})
        time.sleep(STORE.seconds)
        if STORE.forbid and STORE.forbid in urllib.parse.unquote(self.path):
            return self.reply(403, {"error": {"code": 403, "message": "injected"}})
        with STORE.lock:
            STORE.requests += 1
            share, rng = STORE.faults
            fault = rng.choice(("429", "503", "cut")) if rng.random() < share else ""
            STORE.failed += bool(fault)
        if fault in ("429", "503"):
            return self.reply(int(fault), {"error": {"code": int(fault), "message": "injected"}})
        self.cut = fault == "cut"
        if url.path.startswith("/batch"):
            return self.batch()
        found = re.fullmatch(
            r"(/upload|/download|)/(?:storage/v1|resumable)/b/([^/]+)(?:/o(?:/(.*))?|/(.*))?", url.path
        )
        if not found:
            return self.reply(404, {"error": {"code": 404, "message": "no such resource"}})
        kind, bucket, name, other = found.groups()
        name = urllib.parse.unquote(name) if name else None
        return self.act(kind, bucket, name, other, "/o" in url.path)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def act(self, kind, bucket, name, other, is_object):
        if kind == "/upload":
            return self.upload(bucket)
        if name and (copy := re.fullmatch(r"(.*)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.*)", name)):
            return self.copy(bucket, *copy.groups())
        if self.command == "GET" and name:
            return self.read(bucket, name, media=kind == "/download" or self.query.get("alt") == "media")
        if self.command == "DELETE" and name:
            return self.reply(*self.delete(bucket, name, self.query.get("ifGenerationMatch")))
        if self.command == "GET" and is_object:
            return self.list(bucket)
        if self.command == "GET" and not other:
            return self.reply(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
        return self.reply(404, {"error": {"code": 404, "message": "not found"}})

    def reply(self, status, content=None, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.close_connection = self.close_connection or self.cut
        if self.cut and (self.command != "GET" or len(body) < 2):
            return
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(0 if status in (204, 304) else len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body[: len(body) // 2] if self.cut else body)

    def read(self, bucket, name, media):
        with STORE.lock:
            found = STORE.objects.get((bucket, name))
            if found is None:
                return self.reply(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
            about = STORE.about(bucket, name)
        generation, content = found
        if self.query.get("ifGenerationNotMatch") == str(generation):
            return self.reply(304)
        if self.query.get("ifGenerationMatch") not in (None, str(generation)):
            return self.reply(412, {"error": {"code": 412, "message": "generation differs"}})
        if not media:
            return self.reply(200, about)
        headers = [("x-goog-generation", str(generation)), ("Content-Type", "application/octet-stream")]
        headers.append(("x-goog-hash", f"md5={about['md5Hash']}"))
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = asked.groups()
            start = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last) + 1 if first and last else len(content), len(content))
            if start >= len(content):
                return self.reply(416, {"error": {"code": 416, "message": "range not satisfiable"}})
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{len(content)}"))
            return self.reply(206, content[start:end], headers)
        return self.reply(200, content, headers)

    def delete(self, bucket, name, wanted):
        with STORE.lock:
            found = STORE.objects.get((bucket, name))
            if found is None:
                return 404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}
            if wanted is not None and int(wanted) != found[0]:
                return 412, {"error": {"code": 412, "message": "generation differs"}}
            STORE.change("objects", (bucket, name), None)
        return 204, None

    def list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        first, last = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        after, most = self.query.get("pageToken", ""), int(self.query.get("maxResults") or 1000)
        items, prefixes, token = [], [], None
        with STORE.lock:
            for owner, name in sorted(STORE.objects):
                if owner != bucket or not name.startswith(prefix) or name < first or (last and name >= last):
                    continue
                rest = name[len(prefix) :]
                shown = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else name
                if shown <= after or shown in prefixes[-1:]:
                    continue
                if len(items) + len(prefixes) == most:
                    token = max([item["name"] for item in items] + prefixes)
                    break
                if shown == name:
                    items.append(STORE.about(bucket, name))
                else:
                    prefixes.append(shown)
        found = dict(kind="storage#objects", items=items, prefixes=prefixes)
        self.reply(200, found | ({"nextPageToken": token} if token else {}))

    def upload(self, bucket):
        kind, wanted = self.query.get("uploadType"), self.query.get("ifGenerationMatch")
        if key := self.query.get("upload_id"):
            return self.upload_part(bucket, key)
        if kind == "resumable":
            key, about = str(next(STORE.numbers)), json.loads(self.body or b"{}")
            STORE.change("uploads", key, (about.get("name") or self.query["name"], b"", wanted))
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return self.reply(200, {}, [("Location", place)])
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = email.parser.BytesParser().parsebytes(head + self.body).get_payload()
            name = json.loads(parts[0].get_payload())["name"]
            content = self.between(parts)
        else:
            name, content = self.query["name"], self.body
        return self.stored(STORE.put(bucket, name, content, wanted))

    def between(self, parts):
        """The bytes of the second part; the parser of e-mail would change line ends."""
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
        second = self.body.split(b"--" + boundary)[2]
        line_end = re.match(rb"\r?\n", second)[0]  # the content may end with one, or with a part of one, of its own
        return second.partition(line_end * 2)[2].removesuffix(line_end)

    def stored(self, about):
        if about is None:
            return self.reply(412, {"error": {"code": 412, "message": "generation differs"}})
        return self.reply(200, about)

    def upload_part(self, bucket, key):
        name, content, wanted = STORE.uploads[key]
        if isinstance(content, dict):  # of the object: the upload is complete, and the client may not know
            return self.stored(content)
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range") or "")
        if asked and asked[1] is not None:
            content = content[: int(asked[1])] + self.body
        elif not asked:
            content = self.body
        STORE.change("uploads", key, (name, content, wanted))
        if asked and (asked[3] == "*" or len(content) < int(asked[3])):
            held = [("Range", f"bytes=0-{len(content) - 1}")] if content else []
            return self.reply(308, {}, held)
        with STORE.lock:
            if about := STORE.put(bucket, name, content, wanted):
                STORE.change("uploads", key, (name, about, wanted))
        return self.stored(about)

    def copy(self, bucket, name, other_bucket, other):
        with STORE.lock:
            if (bucket, name) not in STORE.objects:
                return self.reply(404, {"error": {"code": 404, "message": "no such object"}})
            about = STORE.put(other_bucket, other, STORE.objects[bucket, name][1], None)
        return self.reply(200, {"done": True, "resource": about, "kind": "storage#rewriteResponse"} | about)

    def batch(self):
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1]
        answers = []
        for part in self.body.decode().split(f"--{boundary}")[1:-1]:
            number = re.search(r"Content-ID: <?(.*?)>?\r?\n", part, re.I)
            line = re.search(r"(DELETE) (\S+)", part)
            path = urllib.parse.unquote(urllib.parse.urlsplit(line[2]).path)
            bucket, name = re.search(r"/b/([^/]+)/o/(.*)", path).groups()
            status, _ = self.delete(bucket, name, None)
            head = f"Content-Type: application/http\r\nContent-ID: <response-{number[1] if number else ''}>\r\n\r\n"
            answers.append(f"--reply\r\n{head}HTTP/1.1 {status} x\r\nContent-Length: 0\r\n\r\n\r\n")
        body = ("".join(answers) + "--reply--\r\n").encode()
        self.reply(200, body, [("Content-Type", "multipart/mixed; boundary=reply")])


class Server(http.server.ThreadingHTTPServer):
    """Many connections at once."""

    daemon_threads, request_queue_size = True, 128


if __name__ == "__main__":
    if len(sys.argv) > 2:
        STORE.open_journal(sys.argv[2])
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
