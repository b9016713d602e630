# One page a task, over all its configurations and folds; and one over all tasks, where there are several.


rule report:
    input:
        expand(
            RESULTS + "/{{task}}/{configuration}/fold{fold}/metrics.json", configuration=CONFIGURATIONS, fold=FOLDS
        ),
        lambda wildcards: [path for path in models() if path == f"{RESULTS}/{wildcards.task}/model/package.json"],
    output:
        RESULTS + "/{task}/report.html",
        RESULTS + "/{task}/report.md",
        RESULTS + "/{task}/report.json",
        RESULTS + "/{task}/report.pdf",
        RESULTS + "/{task}/metrics.csv",
    log:
        RESULTS + "/logs/{task}/report.log",
    params:
        run=RESULTS + "/{task}",
    threads: threads_for(1)
    resources:
        mem_mb=megabytes(4000),
        runtime=30,
    shell:
        "{MEDSEG} report {params.run:q} --pdf > {log} 2>&1"


rule report_all:
    input:
        expand(RESULTS + "/{task}/report.html", task=TASKS),
    output:
        RESULTS + "/report.html",
    log:
        RESULTS + "/logs/report.log",
    params:
        runs=expand(RESULTS + "/{task}", task=TASKS),
    threads: threads_for(1)
    resources:
        mem_mb=megabytes(4000),
        runtime=30,
    shell:
        "{MEDSEG} report {params.runs:q} -o {output:q} > {log} 2>&1"
