"""JUnit XML from checks, for the CI systems that show it; valid by the schemas of ant's task and of Jenkins."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import datetime

from growkit.deploy.checks import Check, shown

# XML 1.0 has no way to write these, escaped or not
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(checks: Sequence[Check], *, suite: str, started: datetime, seconds: float) -> str:
    """One test case per check; an inconclusive check is a skipped case.

    started  when the checks began, in UTC; seconds is what all of them took: a single check has no time of its own
    """
    root = ET.Element("testsuites")
    counts = {
        "tests": len(checks),
        "failures": sum(c.verdict == "fail" for c in checks),
        "errors": 0,
        "skipped": sum(c.verdict == "inconclusive" for c in checks),
    }
    attributes = {
        "name": _clean(suite),
        "timestamp": started.strftime("%Y-%m-%dT%H:%M:%S"),  # the schemas know no time zone
        "hostname": "localhost",  # they ask for one; a report that travels names no machine
        "time": f"{seconds:.3f}",
        "package": _clean(suite),
        "id": "0",
        **{name: str(count) for name, count in counts.items()},
    }
    element = ET.SubElement(root, "testsuite", attributes)
    ET.SubElement(element, "properties")
    for c in checks:
        named = {"classname": f"{_clean(suite)}.{c.group}", "name": _clean(c.name), "time": "0.000"}
        case = ET.SubElement(element, "testcase", named)
        if c.verdict == "fail":
            outcome = ET.SubElement(case, "failure", {"message": _clean(c.line), "type": c.group})
        elif c.verdict == "inconclusive":
            outcome = ET.SubElement(case, "skipped", {"message": _clean(c.line)})
        else:
            continue
        # GitLab shows the text alone, others the message
        outcome.text = _clean(f"{c.line}\nmeasured {shown(c.measured)}, allowed {shown(c.limit)}")
    ET.SubElement(element, "system-out")
    ET.SubElement(element, "system-err")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    return UNWRITABLE.sub("?", text)
