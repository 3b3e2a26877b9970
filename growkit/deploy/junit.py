"""JUnit XML from checks, for CI systems that show it; valid under the schemas of ant's task and of Jenkins."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import datetime

from growkit.deploy.checks import Check, shown
from growkit.text import visible


def junit_xml(checks: Sequence[Check], *, suite: str, started: datetime, seconds: float) -> str:
    """Make a test case of each check; an inconclusive one is a skipped case. What XML cannot hold is spelled out.

    started  when the checks began, in UTC
    seconds  duration of all of them; a single check has no time of its own
    """
    root = ET.Element("testsuites")
    counts = {
        "tests": len(checks),
        "failures": sum(c.verdict == "fail" for c in checks),
        "errors": 0,
        "skipped": sum(c.verdict == "inconclusive" for c in checks),
    }
    attributes = {
        "name": visible(suite),
        "timestamp": started.strftime("%Y-%m-%dT%H:%M:%S"),  # the schemas allow no time zone
        "hostname": "localhost",  # required; a report that is passed on names no machine
        "time": f"{seconds:.3f}",
        "package": visible(suite),
        "id": "0",
        **{name: str(count) for name, count in counts.items()},
    }
    element = ET.SubElement(root, "testsuite", attributes)
    ET.SubElement(element, "properties")
    for c in checks:
        named = {"classname": visible(f"{suite}.{c.group}"), "name": visible(c.name), "time": "0.000"}
        case = ET.SubElement(element, "testcase", named)
        if c.verdict == "fail":
            outcome = ET.SubElement(case, "failure", {"message": visible(c.line), "type": visible(c.group)})
        elif c.verdict == "inconclusive":
            outcome = ET.SubElement(case, "skipped", {"message": visible(c.line)})
        else:
            continue
        # GitLab shows the text alone, others the message
        lines = (c.line, f"measured {shown(c.measured)}, allowed {shown(c.limit)}")
        outcome.text = "\n".join(map(visible, lines))
    ET.SubElement(element, "system-out")
    ET.SubElement(element, "system-err")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
