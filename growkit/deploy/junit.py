"""JUnit XML from checks, for the CI systems that show it (the schema of junit.org's ant task)."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from growkit.deploy.checks import Check, shown

# XML 1.0 has no way to write these, escaped or not
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(checks: Sequence[Check], *, suite: str) -> str:
    """One test case per check; an inconclusive check is a skipped case."""
    root = ET.Element("testsuites")
    counts = {
        "tests": len(checks),
        "failures": sum(c.verdict == "fail" for c in checks),
        "errors": 0,
        "skipped": sum(c.verdict == "inconclusive" for c in checks),
    }
    attributes = {name: str(count) for name, count in counts.items()}
    element = ET.SubElement(root, "testsuite", {"name": _clean(suite), **attributes})
    for c in checks:
        case = ET.SubElement(element, "testcase", {"classname": f"{_clean(suite)}.{c.group}", "name": _clean(c.name)})
        if c.verdict != "pass":
            kind = "failure" if c.verdict == "fail" else "skipped"
            outcome = ET.SubElement(case, kind, {"message": _clean(c.line)})
            outcome.text = _clean(f"measured {shown(c.measured)}, allowed {shown(c.limit)}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    return UNWRITABLE.sub("?", text)
