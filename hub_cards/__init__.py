"""The templates of the cards (jinja2), installed beside lqa; filled in by lqa.cards."""
