"""Records made readable: tables and one self-contained HTML page."""
