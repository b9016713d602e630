# One network for each task, configuration and fold.


rule train:
    input:
        RESULTS + "/{task}/{configuration}/preprocessed/store.json",
        RESULTS + "/{task}/folds.json",
        # Read for what it asks for, before it is there too.
        plan=RESULTS + "/{task}/plan.json",
    output:
        # Checkpoints are none of these: Snakemake removes a rule's outputs before it runs it again.
        RESULTS + "/{task}/{configuration}/fold{fold}/model/package.json",
        RESULTS + "/{task}/{configuration}/fold{fold}/log.json",
    log:
        RESULTS + "/logs/{task}/train-{configuration}-fold{fold}.log",
    params:
        run=RESULTS + "/{task}",
        seed=config["seed"],
        device=config["device"],
    threads: threads_for(config["threads"])
    resources:
        gpu=1 if HAS_GPU else 0,
        mem_mb=training_mb,
        runtime=training_minutes,
    # Added to the log: where Snakemake was killed, the job before this one may still be writing to it.
    shell:
        "{MEDSEG} train {params.run:q} -c {wildcards.configuration} --fold {wildcards.fold} "
        "--seed {params.seed} --device {params.device} --threads {THREADS} --memory {resources.mem_mb}MB >> {log} 2>&1"
