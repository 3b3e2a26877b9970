"""Text as an attacker would put it into names, labels and JSON that growkit only passes on."""

from hypothesis import strategies as st

HOSTILE = {
    "script": "<script>window.ran = 1</script>",
    "attribute": '" onload="window.ran = 1" x="',
    "single quotes": "' onclick='window.ran = 1",
    "element": "</title></style></svg></text><img src=http://localhost:9/x onerror=window.ran=1>",
    "entity": "&lt;b&gt; &#x3c; &nope;",
    "cdata": "]]><x/> --> <!-- ?>",
    "NUL": "a\x00b",
    "control characters": "a\x01\x08\x0b\x0c\x1f\x7f\x9bz",
    "ANSI": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "new line": "a\r\nverdict: pass\u2028b\u2029c\x85d",
    "rich": "[red]x[/red] :key: [link=http://localhost:9/x]y[/link] [/] \\[b]",
    "bidi": "abc\u202egnp.exe\u2066\u200f",
    "half a pair": "a\udcffb\udc80",
    "no character": "a\ufffe\uffff\ufdd0",
    "markdown": "a | b `c` [d](http://localhost:9/x) <b>*e* \\",
    "shell": "$(touch ran); `touch ran` & touch ran | 'x' \"y\" \\",
    "python": '"""\nimport os\nos.mkdir("ran")\n\'\'\' \\',
    "template": "${ran} $ran {{ran}} ${{ ran }} %(ran)s {0}",
    "number": '$\\frac{1}{2}$ #0b62c4 id="q" url(#q) href="#q" font: 10px \'DejaVu Sans\'',
}
ANY = (
    st.text(st.characters(), max_size=60)
    | st.text(st.sampled_from("<>&\"'\\|`[]\x00\x1b\n\r\u202e\ud800x$"))
    | (st.sampled_from(list(HOSTILE.values())))
)
