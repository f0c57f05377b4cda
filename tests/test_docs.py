"""The documentation names files, modules, commands and messages that exist, and no registry's host."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ffn2moe.choices import GATES
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.dense.families import FAMILIES
from ffn2moe.distill.divergences import DIVERGENCES
from ffn2moe.runtime.plans import PLANS

PROJECT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return [PROJECT / name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]


PAGES = tracked("*.md") or sorted(PROJECT.glob("*.md"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which has no such heading"


def test_every_page_of_docs_is_reached_from_the_index():
    reached, todo = set(), [PROJECT / "docs/README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in LINK.findall(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_dir():
                todo += target.glob("*.md")
            elif target.suffix == ".md" and target.exists():
                todo.append(target)
    missing = [str(page.relative_to(PROJECT)) for page in tracked("docs/*.md") if page.resolve() not in reached]
    assert not missing, f"no page leads to {', '.join(missing)}"


OURS = ("ffn2moe", "tasks", "flows", "benchmarks", "tests")


def exists(module: str) -> bool:
    path = PROJECT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


# The pages of docs/extend name the files that their examples create; tests of their own run them.
@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "extend"], ids=str)
def test_every_module_path_and_target_that_a_page_names_exists(page):
    text = page.read_text()
    modules = {name for name in re.findall(r"python -m ([\w.]+\w)", text) if name.split(".")[0] in OURS}
    paths = set(re.findall(rf"\b(?:{'|'.join(OURS)})/[\w/]+\.(?:py|j2|cpp)\b", text))
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    known = set(re.findall(r"^([a-z ]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    missing = [name for name in modules if not exists(name)]
    missing += [path for path in paths if not (PROJECT / path).is_file()]
    missing += [f"make {target}" for target in targets - {one for line in known for one in line.split()}]
    assert not [name for name in missing if name.islower()]  # STAGE and NAME stand for any


def plan_rows() -> list[str]:
    """Return the rows of the table in docs/plans.md."""
    rows = []
    for name, plan in PLANS.items():
        engine = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[plan.engine]
        ffns = "dense" if plan.dense or plan.without_experts else "mixture"
        operator = plan.operator and f"`{plan.operator.name}`"
        cells = (f"`{name}`", engine, plan.bits, plan.activations, ffns, operator)
        cells += (", ".join(plan.heads), ", ".join(plan.on_request))
        rows.append("| " + " | ".join(str(cell or "") for cell in cells) + " |")
    return rows


def test_the_page_of_plans_is_the_table_of_plans():
    page = (PROJECT / "docs/plans.md").read_text()
    found = [line for line in page.splitlines() if line.startswith("| `")]
    assert found == plan_rows(), "write into docs/plans.md:\n" + "\n".join(plan_rows())


def test_the_pages_name_every_row_of_the_tables():
    families = (PROJECT / "docs/families.md").read_text().partition("Activations:")[0]
    listed = set(re.findall(r"[a-z][\w-]+", families))
    assert not [name for name in FAMILIES if name not in listed]
    for page, table in (("methods.md", GATES), ("methods.md", DIVERGENCES), ("containers.md", CONTAINERS)):
        text = (PROJECT / "docs" / page).read_text()
        assert not [name for name in table.shipped() if f"`{name}`" not in text], page


def test_the_messages_that_the_pages_explain_are_those_of_the_code():
    code = "".join(path.read_text() for folder in ("tasks", "flows") for path in (PROJECT / folder).glob("*.py"))
    section = (PROJECT / "docs/deployment.md").read_text().partition("## When it does not work")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 5
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, f"no message says {part.strip()!r}"


def test_no_file_names_the_host_of_a_registry():
    hosts = re.compile("pypi[.]org|python" + "hosted|npm" + "js[.]|download[.]pytorch")
    files = [path for path in tracked() if path.suffix != ".png"]
    assert not [str(path.relative_to(PROJECT)) for path in files if hosts.search(path.read_text())]
