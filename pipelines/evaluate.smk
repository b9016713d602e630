# Predictions against the reference, case by case and label by label.


rule evaluate:
    input:
        RESULTS + "/{task}/{configuration}/fold{fold}/predictions/predictions.json",
    output:
        RESULTS + "/{task}/{configuration}/fold{fold}/metrics.csv",
        RESULTS + "/{task}/{configuration}/fold{fold}/metrics.json",
    log:
        RESULTS + "/logs/{task}/evaluate-{configuration}-fold{fold}.log",
    params:
        task=task_folder,
        fold=RESULTS + "/{task}/{configuration}/fold{fold}",
        tolerance="" if config["tolerance_mm"] is None else f"--tolerance {config['tolerance_mm']}",
    threads: threads_for(1)
    resources:
        mem_mb=megabytes(4000),
        runtime=60,
    shell:
        "{MEDSEG} evaluate {params.fold:q}/predictions {params.task:q} -o {params.fold:q} "
        "--threads {threads} {params.tolerance} > {log} 2>&1"
