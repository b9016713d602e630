# One page a task, over all its configurations and folds.


rule report:
    input:
        expand(
            RESULTS + "/{{task}}/{configuration}/fold{fold}/metrics.json", configuration=CONFIGURATIONS, fold=FOLDS
        ),
        lambda wildcards: [path for path in models() if path == f"{RESULTS}/{wildcards.task}/model/package.json"],
    output:
        RESULTS + "/{task}/report.html",
        RESULTS + "/{task}/report.md",
    log:
        RESULTS + "/logs/{task}/report.log",
    params:
        run=RESULTS + "/{task}",
    threads: threads_for(1)
    resources:
        mem_mb=4000,
        runtime=30,
    shell:
        "{MEDSEG} report {params.run:q} > {log} 2>&1"
