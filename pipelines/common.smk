# What the rules share: the configuration, checked; which tasks there are; how many cores a job takes.

import contextlib
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import time
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
# Environment modules that each job loads first; a name that the cluster does not have ends it, with its reason.
if listed(config["modules"]):
    shell.prefix(f"module load {' '.join(map(shlex.quote, listed(config['modules'])))} && ")
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


# In no rule's params: a node that has fewer must not make what is done look outdated. (In a rule's shell, as here,
# stands what the outermost workflow makes of the configuration, and what a protocol changes stands in params.)
THREADS = cores(config["threads"])
# What a job may take, of which the plan is told: unless given, no more than four fifths of this machine's memory.
MOST_MB = config["memory_mb"] or min(8000, int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6))


def machine_options():
    """The machine that plans are made for: this one, or a fixed one, so that the plan is the same everywhere."""
    if fixed := config["fixed"]:
        most = "--gpu-memory" if fixed["machine"] == "gpu" else "--memory"
        return f"--machine {fixed['machine']} {most} {fixed['memory']}"
    return "--machine gpu" if HAS_GPU else f"--machine cpu --memory {MOST_MB}MB"


ENGINE = {"auto": "auto", "cpu": "openvino", "cuda": "torch-cuda"}[config["device"]]


def megabytes(wanted):
    """Memory that a job asks for; where it was not enough, half as much again with each retry."""
    return lambda wildcards, attempt: int(min(wanted, MOST_MB) * 1.5 ** (attempt - 1))


def cost(wildcards, input):
    """What the plan says that a training takes; none where it was edited so that nobody knows. Until the plan is
    there Snakemake takes it that this is to be known later."""
    plan = json.loads(Path(input.plan).read_text())
    return plan["configurations"].get(wildcards.configuration, {}).get("cost")


def training_mb(wildcards, input, attempt):
    """Memory for a training: what the plan reckons, a quarter more, and room for the cases."""
    known = cost(wildcards, input)
    wanted = 1.25 * known["ram_bytes"] / 1e6 + min(2 * known["disk_bytes"] / 1e6, 4000) + 300 if known else MOST_MB
    return megabytes(wanted)(wildcards, attempt)


def training_minutes(wildcards, input, attempt):
    """Time for a training: what the plan reckons and half as much, and a quarter of an hour; with each retry as much
    again. A training that is ended goes on from its checkpoint."""
    known = cost(wildcards, input)
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
    if config["fixed"]:
        return f"--steps {config['fixed']['steps']} --no-measure"
    return " ".join(f"--budget {name}={time}" for name, time in budgets(wildcards).items()) or f"--budget {config['budget']}"


def minutes(wildcards):
    """What a training may take, start and validation included; a day, where steps are given and no time is."""
    if config["fixed"]:
        return 1440
    units = {"d": 1440, "h": 60, "m": 1, "s": 1 / 60}
    parts = re.findall(r"([0-9.]+)([dhms])", budgets(wildcards).get(wildcards.configuration, config["budget"]))
    return int(1.2 * sum(float(n) * units[u] for n, u in parts)) + 10


def models():
    """The models of all folds, where all are trained and one is wanted."""
    whole = config["choose"] == "auto" and set(FOLDS) == set(range(config["of_folds"]))
    return [f"{RESULTS}/{task}/model/package.json" for task in TASKS] if whole else []


def asked_of(job):
    """What a job asks for, as `medseg preflight` takes it; nothing of what is not known yet."""
    numbers = {name: job.resources.get(name) for name in ("mem_mb", "runtime", "gpu")}
    known = {name: value if isinstance(value, int) else None for name, value in numbers.items()}
    return {
        "rule": job.rule.name,
        "partition": str(job.resources.get("slurm_partition") or ""),
        "account": str(job.resources.get("slurm_account") or ""),
        "cores": job.threads if isinstance(job.threads, int) else 1,
        "gpus": known["gpu"] or 0,
        "memory_mb": known["mem_mb"],
        "minutes": known["runtime"],
    }


def present():
    """Date what lies in the future now, as a clock that was wrong left it: of such a file Snakemake takes all that is made
    from it to be older, and throws it away. Contents stay; an archive's shards and tasks of others are not looked at."""
    now, dated = time.time(), 0
    for folder, names, files in os.walk(RESULTS):
        if folder == RESULTS and "archive" in names:
            names.remove("archive")
        for path in (os.path.join(folder, file) for file in files):
            # A job of an earlier start may take it away, and what cannot be written the preflight tells.
            with contextlib.suppress(OSError):
                if os.lstat(path).st_mtime > now + 1:
                    os.utime(path, (now, now), follow_symlinks=False)
                    dated += 1
    if dated:
        print(f"medseg: {dated} files in {RESULTS} were dated in the future, and are dated now", file=sys.stderr)


def work_of(job):
    """The folder and the comment that SLURM has of a job, as Snakemake's executor gives them."""
    wildcards = "_".join(job.wildcards).replace("/", "_")
    return f"{workflow.workdir_init}|rule_{job.rule.name}" + (f"_wildcards_{wildcards}" if wildcards else "")


def preflight():
    """Stop before anything starts, where something will keep it from ending."""
    present()
    # Only now is it known where jobs run.
    for key, words in {"device": "device=cpu or device=cuda", "memory_mb": "memory_mb=16000, or what a node has"}.items():
        if workflow.non_local_exec and config[key] in ("auto", None):
            raise WorkflowError(
                f"medseg: jobs run on other machines, and {key} is taken from this one. Say {words}, in the profile's "
                "medseg.yaml or by --config. Nothing was started."
            )
    submitted = [job for job in workflow.dag.needrun_jobs() if not (job.is_group() or job.is_local)]
    jobs = {json.dumps(asked_of(job)) for job in submitted}
    # The name of all jobs of a start. No other start is at these works now: Snakemake locks what they make, in its folder.
    starts, start = Path(RESULTS, "logs", "slurm-starts.txt"), getattr(workflow.scheduler._executor, "run_uuid", "")
    made = Path(RESULTS).resolve()
    wanted = {
        "results": RESULTS,
        "tasks": [str(folder) for folder in TASKS.values() if made not in folder.resolve().parents],
        "slurm": workflow.non_local_exec and "slurm" in str(workflow.executor_plugin.name),
        "ask_nodes": config["ask_nodes"],
        "jobs": [json.loads(job) for job in sorted(jobs)],
        "starts": starts.read_text(errors="replace").split() if starts.is_file() else [],
        "works": sorted({work_of(job) for job in submitted}),
    }
    asked = subprocess.run([sys.executable, "-m", "medseg", "preflight"], input=json.dumps(wanted), text=True)
    if asked.returncode:
        raise WorkflowError("medseg: nothing was started.")
    if start:
        starts.parent.mkdir(parents=True, exist_ok=True)
        with starts.open("a") as record:
            record.write(f"{start}\n")


def reports():
    over_all = [f"{RESULTS}/report.html"] if len(TASKS) > 1 else []
    return [f"{RESULTS}/{task}/report.html" for task in TASKS] + over_all


def print_reports():
    """Those that there are: another target may have been asked for."""
    archive = [f"{RESULTS}/archive/report.html"] if config["archive"] else []
    for path in filter(os.path.exists, [*reports(), *archive]):
        print(f"report: {path}", file=sys.stderr)
    for path in filter(os.path.exists, models()):
        print(f"model: {Path(path).parent}", file=sys.stderr)
