"""Hold every pin of constraints.txt against the published vulnerabilities; exit 1 if one concerns us."""

import json
import shutil
import subprocess
import sys

# Those that do not concern us, each with the reason: {"PYSEC-…": "why"}.
ACCEPTED: dict[str, str] = {}

_COMMAND = "pip-audit --requirement constraints.txt --no-deps --disable-pip --format json"


def main() -> int:
    """Print what is found, and of how many pins it could be asked."""
    words = _COMMAND.split() + [f"--ignore-vuln={name}" for name in ACCEPTED]
    report = ""
    if shutil.which("pip-audit"):
        report = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    pins = json.loads(report)["dependencies"] if report else []
    audited = [pin for pin in pins if "vulns" in pin]
    if not audited:
        print("audit: not done, the database of vulnerabilities cannot be reached from here")
        return 0
    found = [(pin, flaw) for pin in audited for flaw in pin["vulns"]]
    for pin, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        print(f"audit: {pin['name']} {pin['version']}: {flaw['id']}, mended in {fixed}")
    print(f"audit: {len(found)} vulnerabilities in {len(audited)} of {len(pins)} pins")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
