# A fixed protocol over the tasks, and its results in one file that others can verify: `snakemake benchmark`.

from medseg.core.errors import InputError
from medseg.report.results import parse_protocol


def protocol_file():
    """The protocol's file: of the working folder, or else one that comes with the workflow."""
    path = Path(config["protocol"])
    return path if path.exists() else Path(workflow.basedir) / path


def read_protocol(path):
    try:
        return parse_protocol(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise WorkflowError(f"medseg: the protocol {path} cannot be read: {error}") from None
    except InputError as error:
        raise WorkflowError(f"medseg: {error}") from None


PROTOCOL = read_protocol(protocol_file())


def fixed(seed):
    """The configuration that the protocol asks for: what it says nothing of is as configured."""
    settings = {
        "results": f"{RESULTS}/benchmark/seed{seed}",
        "seed": seed,
        "configurations": list(PROTOCOL.configurations),
        "family": PROTOCOL.family,
        "folds": list(PROTOCOL.folds),
        "of_folds": PROTOCOL.of_folds,
        "fixed": {"steps": PROTOCOL.steps, "machine": PROTOCOL.machine, "memory": PROTOCOL.memory},
        "choose": "never",
        "splits": {},
        "unlabelled": [],
        "tolerance_mm": None,
    }
    return {**config, **settings}


def runs():
    return [f"{RESULTS}/benchmark/seed{seed}/{task}" for seed in PROTOCOL.seeds for task in TASKS]


for SEED in PROTOCOL.seeds:
    SEEDED = f"benchmark_seed{SEED}_"

    module:
        name:
            SEEDED
        snakefile:
            "protocol.smk"
        config:
            fixed(SEED)

    use rule * from SEEDED as SEEDED*


rule benchmark:
    input:
        expand(
            "{run}/{configuration}/fold{fold}/metrics.json",
            run=runs(),
            configuration=PROTOCOL.configurations,
            fold=PROTOCOL.folds,
        ),
        expand("{run}/report.html", run=runs()),
        protocol=protocol_file(),
    output:
        report(RESULTS + "/results.json", caption="captions/results.rst", category="Benchmark", labels={"what": "results"}),
        RESULTS + "/ro-crate-metadata.json",
    log:
        RESULTS + "/logs/benchmark.log",
    params:
        runs=runs(),
        constraints=Path(workflow.basedir) / "constraints.txt",
    threads: threads_for(1)
    resources:
        mem_mb=2000,
        runtime=60,
    shell:
        "{MEDSEG} record {params.runs:q} --protocol {input.protocol:q} --constraints {params.constraints:q} "
        "-o {output[0]:q} --threads {threads} > {log} 2>&1"
