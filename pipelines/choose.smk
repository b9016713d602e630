# One model of all folds: the best configuration, its networks averaged, post-processing where it helps.


rule choose:
    input:
        expand(
            RESULTS + "/{{task}}/{configuration}/fold{fold}/{part}",
            configuration=CONFIGURATIONS,
            fold=FOLDS,
            part=["model/package.json", "predictions/predictions.json"],
        ),
    output:
        RESULTS + "/{task}/model/package.json",
    log:
        RESULTS + "/logs/{task}/choose.log",
    params:
        run=RESULTS + "/{task}",
        configurations=" ".join(f"-c {name}" for name in CONFIGURATIONS),
    threads: threads_for(config["threads"])
    resources:
        mem_mb=megabytes(8000),
        runtime=120,
    shell:
        "{MEDSEG} choose {params.run:q} {params.configurations} --threads {THREADS} > {log} 2>&1"
