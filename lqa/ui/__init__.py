"""The web page (imported by app.py only): `build` the Blocks over a decoder, `launch` them."""

from lqa.ui.page import build, launch

__all__ = ["build", "launch"]
