# A task made, checked, planned and preprocessed.


if not listed(config["tasks"]):

    rule phantom:
        output:
            RESULTS + "/phantoms/{task}/dataset.json",
        log:
            RESULTS + "/logs/{task}/phantom.log",
        params:
            name=lambda wildcards: PHANTOMS[wildcards.task],
            cases=config["phantoms"]["cases"],
            seed=config["phantoms"]["seed"],
        threads: threads_for(1)
        resources:
            mem_mb=megabytes(2000),
            runtime=10,
        shell:
            "{MEDSEG} phantom {RESULTS}/phantoms --task {params.name} --cases {params.cases} "
            "--seed {params.seed} > {log} 2>&1"


rule check:
    input:
        task_file,
    output:
        RESULTS + "/checks/{task}.json",
    log:
        RESULTS + "/logs/{task}/check.log",
    params:
        task=task_folder,
    threads: threads_for(1)
    resources:
        mem_mb=megabytes(4000),
        runtime=60,
    shell:
        "{MEDSEG} check {params.task:q} -o {output:q} > {log} 2>&1"


rule plan:
    input:
        RESULTS + "/checks/{task}.json",
        task=task_file,
        splits=lambda wildcards: config["splits"].get(wildcards.task, []),
    output:
        RESULTS + "/{task}/run.json",
        # Not removed before the rule runs again: both may have been edited. `medseg plan` moves such a plan
        # aside and keeps the folds; touched, they are no older than what they were made from.
        update(RESULTS + "/{task}/plan.json"),
        update(RESULTS + "/{task}/folds.json"),
        RESULTS + "/{task}/fingerprint.json",
    log:
        RESULTS + "/logs/{task}/plan.log",
    params:
        task=task_folder,
        run=RESULTS + "/{task}",
        folds=config["of_folds"],
        seed=config["seed"],
        machine=machine_options(),
        budgets=budget_options,
        family=config["family"],
        unlabelled=" ".join(f"--unlabelled {how}" for how in listed(config["unlabelled"])),
        splits=lambda wildcards, input: f"--splits {input.splits}" if input.splits else "",
    # Steps are timed on as many cores as train, and beside nothing else.
    threads: threads_for(config["threads"])
    resources:
        gpu=1 if HAS_GPU else 0,
        mem_mb=megabytes(MOST_MB),
        runtime=60,
    shell:
        "{MEDSEG} plan {params.task:q} -o {params.run:q} --folds {params.folds} --seed {params.seed} "
        "--family {params.family} {params.machine} {params.budgets} {params.unlabelled} --threads {THREADS} {params.splits} > {log} 2>&1 "
        "&& touch {output}"


rule preprocess:
    input:
        RESULTS + "/{task}/run.json",
        RESULTS + "/{task}/plan.json",
        told,
    output:
        RESULTS + "/{task}/{configuration}/preprocessed/store.json",
    log:
        RESULTS + "/logs/{task}/preprocess-{configuration}.log",
    params:
        run=RESULTS + "/{task}",
    threads: threads_for(config["threads"])
    resources:
        mem_mb=megabytes(8000),
        runtime=120,
    shell:
        "{MEDSEG} preprocess {params.run:q} -c {wildcards.configuration} --threads {THREADS} > {log} 2>&1"
