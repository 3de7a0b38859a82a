"""Run by test_zerogpu.py: the page's handlers through the real `spaces` wrappers, on a machine without a GPU.

A small server stands in for the platform's scheduler, and what would be moved to the GPU stays where it is.  torch is patched for the
whole process, hence the process of its own.  Prints one JSON document: what each handler gave through the wrappers and without, and the
GPU seconds that it asked for.
"""

import http.server
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlparse

ASKED = []


class Scheduler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        url = urlparse(self.path)
        if url.path == "/schedule":
            ASKED.append(int(float(parse_qs(url.query).get("durationSeconds", ["60"])[0])))
        body = json.dumps({"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": f"token{len(ASKED)}"}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def never() -> bool:
    return False


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scheduler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cgroup = Path(tempfile.mkdtemp(), "cgroup")
    cgroup.write_text("1:devices:/x/y\n")
    os.environ |= {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_port}",
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(cgroup),
        "ZEROGPU_OFFLOAD_DIR": tempfile.mkdtemp(),
    }
    import torch

    torch.version.cuda = "12.8"
    torch._C._cuda_init = lambda *args: None
    torch.cuda._is_in_bad_fork = never
    import spaces  # noqa: F401  before anything of ours, as in app.py
    import spaces.zero.torch as emulated
    from spaces.zero.torch import patching

    def move(callback=None):
        for fake, original in patching.cuda_aliases.items():
            fake.data = original

    emulated.init, emulated.size, emulated.pack, emulated.move = (lambda uuid: None), (lambda: 0), (lambda: 0), move

    here = Path(__file__).parent
    sys.path[:0] = [str(here.parent), str(here)]
    from conftest import make_config, tiny_base

    from lqa import LatentDecoder
    from lqa.ui import build
    from lqa.ui.api import make_endpoints
    from lqa.ui.read import make_handlers
    from lqa.ui.scan import EVERY
    from lqa.ui.scan import make_handlers as make_scan
    from lqa.ui.steer import make_handlers as make_steer
    from lqa.ui.watch import BOTH, make_watch

    folder = Path(sys.argv[1])

    def decoder() -> LatentDecoder:
        base = tiny_base("smol")
        make_config(base).save(folder)
        return LatentDecoder.from_pretrained(folder, base=base, device="cpu")

    ours, plain = decoder(), decoder()
    ours.base.model.to("cuda")  # as app.py does: torch says that there is one
    assert torch.cuda.is_available() and ours.base.device.type == "cuda"
    build(ours)  # every handler is wrapped once more: nothing that a page does may fail here

    chat = {"turns": [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who is it?"}], "busy": False}
    question = "How will the assistant speak?"
    report = {}

    def both(name, of):
        """`of(decoder)` is a handler with its arguments: through the wrappers in a worker, and in this process."""
        results, before = [], len(ASKED)
        for which in (ours, plain):
            handler, arguments = of(which)
            handler = handler if which is ours else handler.__wrapped__
            given = handler(*arguments)
            results.append(given if isinstance(given, dict) else list(given)[-1])
            if which is ours:
                report[name] = {"seconds": ASKED[before:]}
        report[name] |= {"wrapped": results[0], "plain": results[1]}
        return results[0]

    final = both("ask", lambda d: (make_handlers(d).ask, (chat, None, question + "\nWho is it?", 1, None)))
    view = final[1] | {"ask": {"item": 0, "question": "Who is it?"}}
    both("follow_up", lambda d: (make_handlers(d).follow_up, (view,)))
    both("reply", lambda d: (make_handlers(d).reply, (chat,)))
    both("scan", lambda d: (make_scan(d).scan, (chat, None, question, "Formally.\nLike a pirate.", EVERY, None)))
    both("watch", lambda d: (make_watch(d), (chat, question, "Formally.\nLike a pirate.", BOTH, 1, None)))
    both("read", lambda d: (make_endpoints(d).read, ("Speak like a pirate.", "Who is it?", question)))
    both("score", lambda d: (make_endpoints(d).score, ("", "Who is it?", question, ["Formally.", "Like a pirate."])))
    both("error", lambda d: (make_handlers(d).ask, (chat, None, "", 1, None)))
    table = [["Who is it?", "It is a doctor."]]
    trained = both("train", lambda d: (make_steer(d).train, ("", table, 5, None, None)))
    both("compare", lambda d: (make_steer(d).compare, (chat, "", None, trained[1], 1.0, False, 0)))
    for which in ("wrapped", "plain"):  # the folder has another name, and seconds differ
        curve, folder, *rest = report["train"][which]
        losses = [{k: round(v, 2) for k, v in p.items() if v is not None} for p in curve["points"]]
        report["train"][which] = [losses, Path(folder).name.startswith("lqa-steering-"), *rest]
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
