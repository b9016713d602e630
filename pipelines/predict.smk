# Each fold's held-out cases, predicted by the network that never saw them.


rule predict:
    input:
        RESULTS + "/{task}/{configuration}/fold{fold}/model/package.json",
    output:
        RESULTS + "/{task}/{configuration}/fold{fold}/predictions/predictions.json",
    log:
        RESULTS + "/logs/{task}/predict-{configuration}-fold{fold}.log",
    params:
        task=task_folder,
        fold=RESULTS + "/{task}/{configuration}/fold{fold}",
    threads: threads_for(config["threads"])
    resources:
        gpu=1 if HAS_GPU else 0,
        mem_mb=megabytes(8000),
        runtime=120,
    shell:
        "{MEDSEG} predict {params.task:q} --held-out -m {params.fold:q}/model -o {params.fold:q}/predictions "
        "--engine {ENGINE} --memory {resources.mem_mb}MB --threads {THREADS} > {log} 2>&1"
