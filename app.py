"""The Space's entry: loads a decoder, builds the page, launches it.

python app.py [--check] [--open] [--decoder PATH|HUB_ID] [--host HOST] [--port PORT]
"""

import spaces  # noqa: F401  before torch: ZeroGPU must be in place when CUDA is first looked at

import argparse
import os
import sys

import torch

from lqa import LatentDecoder, LqaError
from lqa.ui import build, launch

CHAT = [
    {"role": "system", "content": "You are a pirate captain. Answer in the words of a pirate."},
    {"role": "user", "content": "What should I cook tonight?"},
]
QUESTION = "Who is the assistant pretending to be?"


def load(source: str | None) -> LatentDecoder:
    """The decoder, on the GPU if there is one."""
    gpu = torch.cuda.is_available()
    # Loaded on the CPU and then moved: loading runs the model once, and ZeroGPU has no real GPU outside of the handlers.
    decoder = LatentDecoder.from_pretrained(source, device="cpu", dtype=torch.bfloat16 if gpu else None)
    if gpu:
        decoder.base.model.to("cuda")
    return decoder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The web page: read a language model's activations in natural language.")
    parser.add_argument("--check", action="store_true", help="build everything, ask one question, print the answer, and exit")
    parser.add_argument("--open", action="store_true", help="open the page in the web browser")
    default = os.environ.get("LQA_DECODER")
    parser.add_argument("--decoder", default=default, help="a folder or Hub id (default: $LQA_DECODER, else the embedded one)")
    parser.add_argument("--host", help="the address to listen on (default: Gradio's)")
    parser.add_argument("--port", type=int, help="the port to listen on (default: Gradio's)")
    args = parser.parse_args(argv)
    try:
        decoder = load(args.decoder)
        demo = build(decoder)
        if args.check:
            answer = decoder.read(CHAT, span="user").ask(QUESTION)[0]
            print(f"{answer.question}\n{answer.text}")
            return 0
    except LqaError as error:
        print(error, file=sys.stderr)
        return 2
    launch(demo, server_name=args.host, server_port=args.port, inbrowser=args.open)
    return 0


if __name__ == "__main__":
    sys.exit(main())
