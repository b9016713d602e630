# What the rules share: the configuration, checked; which tasks there are; how many cores a job takes.

import difflib
import json
import os
import re
import sys
from pathlib import Path

import jsonschema
from snakemake.exceptions import WorkflowError


configfile: str(Path(workflow.basedir) / "pipelines" / "config.yaml")


def remedy(problem):
    """How to mend it: the nearest key for one that there is not, or what the schema says of the value."""
    if problem.validator == "additionalProperties":
        known = problem.schema["properties"]
        near = [difflib.get_close_matches(key, known, n=1) for key in problem.instance if key not in known]
        return "".join(f" Did you mean {found[0]}?" for found in near[:1] if found)
    while problem is not None and "description" not in problem.schema:
        problem = problem.parent
    return f" {problem.schema['description']}." if problem else ""


def checked(config):
    """The configuration, if the schema allows it; otherwise one line that says what is wrong."""
    schema = json.loads((Path(workflow.basedir) / "pipelines" / "schemas" / "config.schema.json").read_text())
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(config))
    if problem is not None:
        where = ".".join(str(part) for part in problem.absolute_path) or "the top level"
        raise WorkflowError(f"medseg: the configuration is wrong at {where}: {problem.message}.{remedy(problem)} See pipelines/config.yaml.")
    return config


def listed(value):
    """A list, also where one value was given on the command line."""
    return value if isinstance(value, list) else [value]


# On the command line Snakemake takes the numbers in [0,1] for words.
config["folds"] = [int(fold) if str(fold).isdigit() else fold for fold in listed(config["folds"])]
checked(config)
RESULTS = config["results"]
CONFIGURATIONS = listed(config["configurations"])
FOLDS = config["folds"]
if max(FOLDS) >= config["of_folds"]:
    raise WorkflowError(f"medseg: fold {max(FOLDS)} of {config['of_folds']}: valid are 0 to {config['of_folds'] - 1}.")

# A second stage is told what the folds of the first found in the cases that each held out.
BEFORE = {"3d-cascade": "3d-low"}
for second, first in BEFORE.items():
    if second in CONFIGURATIONS and first not in CONFIGURATIONS:
        raise WorkflowError(f"medseg: {second} is told what {first} found. Add {first} to the configurations.")
    if second in CONFIGURATIONS and set(FOLDS) != set(range(config["of_folds"])):
        raise WorkflowError(f"medseg: {second} needs all folds of {first}. Let folds be 0 to {config['of_folds'] - 1}.")
    if second in CONFIGURATIONS and listed(config["unlabelled"]):
        raise WorkflowError(f"medseg: {second} cannot learn from scans without labels. Leave it out, or unlabelled empty.")

# Folder names of the phantom tasks, as `medseg phantom` writes them.
PHANTOMS = {f"Phantom_{name.capitalize()}": name for name in config["phantoms"]["tasks"]}


def find_tasks():
    """Task name to folder: those configured, or else the phantoms, which the workflow makes."""
    folders = [Path(task) for task in listed(config["tasks"])]
    if not folders:
        return {name: Path(RESULTS) / "phantoms" / name for name in PHANTOMS}
    for folder in folders:
        if not (folder / "dataset.json").is_file():
            raise WorkflowError(f"medseg: {folder} is no Decathlon task: it has no dataset.json. See data/README.md.")
    named = {folder.resolve().name: folder for folder in folders}
    if len(named) < len(folders):
        raise WorkflowError("medseg: two tasks have the same folder name. Rename one, since results go by that name.")
    return named


TASKS = find_tasks()
if unknown := set(config["splits"]) - set(TASKS):
    raise WorkflowError(f"medseg: splits are given for {sorted(unknown)[0]}, which is none of the tasks.")

# The medseg of the Python that runs Snakemake, whatever PATH says.
MEDSEG = f"{sys.executable} -m medseg"
# Jobs of a cluster run elsewhere: what this machine is says nothing of them.
if workflow.non_local_exec and config["device"] == "auto":
    raise WorkflowError("medseg: device is auto, and jobs run on other machines. Say device=cpu or device=cuda.")
HAS_GPU = config["device"] == "cuda" or (config["device"] == "auto" and Path("/dev/nvidia0").exists())


wildcard_constraints:
    task="|".join(TASKS),
    configuration="|".join(CONFIGURATIONS),
    fold=r"\d+",


# What --cores says; nothing where jobs run on other machines.
GIVEN = workflow.resource_settings.cores


def cores(wanted):
    """Cores that a job computes on: no more than this machine has or Snakemake was given."""
    here = len(os.sched_getaffinity(0))
    return max(1, min(wanted, here, GIVEN or wanted))


def threads_for(wanted):
    """The share of --cores that a job takes. Where --cores promises more than the machine has, each
    real core stands for several, so that no more jobs run than it can bear."""
    if not GIVEN:
        return wanted
    here = min(len(os.sched_getaffinity(0)), GIVEN)
    return max(1, min(GIVEN, round(cores(wanted) * GIVEN / here)))


# In no rule's params, since a machine that differs must not make what is done look outdated.
THREADS = cores(config["threads"])
# What a job may take, of which the plan is told: unless given, no more than four fifths of this machine's memory.
MOST_MB = config["memory_mb"] or min(8000, int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6))
PLANNED_FOR = "--machine gpu" if HAS_GPU else f"--machine cpu --memory {MOST_MB}MB"
ENGINE = {"auto": "auto", "cpu": "openvino", "cuda": "torch-cuda"}[config["device"]]


def megabytes(wanted):
    """Memory that a job asks for; where it was not enough, half as much again with each retry."""
    return lambda wildcards, attempt: int(min(wanted, MOST_MB) * 1.5 ** (attempt - 1))


def cost(wildcards):
    """What the plan says that a training takes; none where it was edited so that nobody knows. It is there
    once the plan is, and until then Snakemake asks again later."""
    plan = json.loads((Path(RESULTS) / wildcards.task / "plan.json").read_text())
    return plan["configurations"].get(wildcards.configuration, {}).get("cost")


def training_mb(wildcards, attempt):
    """Memory for a training: what the plan reckons, a quarter more, and room for the cases."""
    known = cost(wildcards)
    wanted = 1.25 * known["ram_bytes"] / 1e6 + min(2 * known["disk_bytes"] / 1e6, 4000) + 300 if known else MOST_MB
    return megabytes(wanted)(wildcards, attempt)


def training_minutes(wildcards, attempt):
    """Time for a training: what the plan reckons and half as much, and a quarter of an hour; with each retry as much
    again. A training that is ended goes on from its checkpoint."""
    known = cost(wildcards)
    return int(attempt * (90 * known["hours"] + 15)) if known else attempt * minutes(wildcards)


def task_folder(wildcards):
    return TASKS[wildcards.task]


def task_file(wildcards):
    return TASKS[wildcards.task] / "dataset.json"


def told(wildcards):
    """What preprocessing a second stage is told: the predictions of all folds of the first."""
    first = BEFORE.get(wildcards.configuration)
    folds = FOLDS if first else []
    return [f"{RESULTS}/{wildcards.task}/{first}/fold{fold}/predictions/predictions.json" for fold in folds]


def budgets(wildcards):
    """How long training may take, by configuration where that differs: `medseg plan` turns it into steps."""
    return {} if listed(config["tasks"]) else config["phantoms"]["budget"]


def budget_options(wildcards):
    return " ".join(f"--budget {name}={time}" for name, time in budgets(wildcards).items()) or f"--budget {config['budget']}"


def minutes(wildcards):
    """What a training may take, start and validation included."""
    units = {"d": 1440, "h": 60, "m": 1, "s": 1 / 60}
    parts = re.findall(r"([0-9.]+)([dhms])", budgets(wildcards).get(wildcards.configuration, config["budget"]))
    return int(1.2 * sum(float(n) * units[u] for n, u in parts)) + 10


def models():
    """The models of all folds, where all are trained and one is wanted."""
    whole = config["choose"] == "auto" and set(FOLDS) == set(range(config["of_folds"]))
    return [f"{RESULTS}/{task}/model/package.json" for task in TASKS] if whole else []


def reports():
    over_all = [f"{RESULTS}/report.html"] if len(TASKS) > 1 else []
    return [f"{RESULTS}/{task}/report.html" for task in TASKS] + over_all


def print_reports():
    """Those that are there: a target may have been one of them alone."""
    archive = [f"{RESULTS}/archive/report.html"] if config["archive"] else []
    for path in [*reports(), *archive]:
        if Path(path).exists():
            print(f"report: {path}", file=sys.stderr)
    for path in models():
        if Path(path).exists():
            print(f"model: {Path(path).parent}", file=sys.stderr)
