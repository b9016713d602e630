# Many scans as an array: one job a shard, not a scan, and one report over all. What is asked for with
#
#   snakemake archive --config archive=scans.txt model=hippocampus shards=200
#
# docs/scale.md says how large a shard should be. Nothing here is planned unless it is asked for.

ARCHIVE = RESULTS + "/archive"


def shards_of(path):
    """How many shards: as given, and then the list is not read, as each job would; else one for 500 scans."""
    if config["shards"]:
        return config["shards"]
    with open(path, "rb") as lines:
        return max(1, -(-sum(1 for line in lines if line.strip()) // 500))


if config["archive"] is not None:
    if not Path(config["archive"]).is_file():
        raise WorkflowError(f"medseg: {config['archive']} is no list of scans. Write their paths to a text file, one a line.")
    if config["model"] is None:
        raise WorkflowError("medseg: archive goes with a model. Say model=NAME; `medseg models list` tells the names.")
    N_SHARDS = shards_of(config["archive"])

    wildcard_constraints:
        shard=r"\d{5}",

    rule archive_deal:
        input:
            config["archive"],
        output:
            ARCHIVE + "/manifest.jsonl",
        log:
            RESULTS + "/logs/archive/deal.log",
        params:
            folder=ARCHIVE,
        threads: threads_for(1)
        resources:
            mem_mb=megabytes(4000),
            runtime=lambda wildcards, attempt: 60 * attempt,
        shell:
            "{MEDSEG} archive deal {input:q} -o {params.folder:q} -n {N_SHARDS} > {log} 2>&1"

    # The shard's log is no output, and stays when a job is started again: it then goes on where it was. Scans that
    # fail do not fail the job; the report tells of them.
    rule archive_shard:
        input:
            ARCHIVE + "/manifest.jsonl",
        output:
            ARCHIVE + "/shards/{shard}.json",
        log:
            RESULTS + "/logs/archive/{shard}.log",
        params:
            model=config["model"],
            options=" ".join(listed(config["archive_options"])),
            number=lambda wildcards: int(wildcards.shard),
        threads: threads_for(config["threads"])
        resources:
            gpu=1 if HAS_GPU else 0,
            mem_mb=megabytes(8000),
            runtime=lambda wildcards, attempt: 120 * attempt,
        shell:
            "{MEDSEG} predict --manifest {input:q} --shard {params.number}/{N_SHARDS} -m {params.model:q} "
            "--engine {ENGINE} --memory {resources.mem_mb}MB --threads {THREADS} {params.options} > {log} 2>&1"

    rule archive_report:
        input:
            expand(ARCHIVE + "/shards/{shard:05d}.json", shard=range(1, N_SHARDS + 1)),
        output:
            ARCHIVE + "/report.html",
            ARCHIVE + "/report.json",
            ARCHIVE + "/scans.csv",
            ARCHIVE + "/failed.csv",
        log:
            RESULTS + "/logs/archive/report.log",
        params:
            folder=ARCHIVE,
        threads: threads_for(1)
        resources:
            mem_mb=megabytes(4000),
            runtime=60,
        shell:
            "{MEDSEG} archive report {params.folder:q} --allow-failed > {log} 2>&1"


def archive_page(wildcards):
    if config["archive"] is None:
        raise WorkflowError("medseg: no archive is named. Say --config archive=scans.txt model=NAME.")
    return ARCHIVE + "/report.html"


rule archive:
    input:
        archive_page,
    localrule: True
