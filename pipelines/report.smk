# One page a task, over all its configurations and folds; and one over all tasks, where there are several.


rule report:
    input:
        expand(
            RESULTS + "/{{task}}/{configuration}/fold{fold}/metrics.json", configuration=CONFIGURATIONS, fold=FOLDS
        ),
        lambda wildcards: [path for path in models() if path == f"{RESULTS}/{wildcards.task}/model/package.json"],
    output:
        report(RESULTS + "/{task}/report.html", caption="captions/report.rst", category="{task}", labels={"what": "page"}),
        RESULTS + "/{task}/report.md",
        RESULTS + "/{task}/report.json",
        report(RESULTS + "/{task}/report.pdf", caption="captions/report.rst", category="{task}", labels={"what": "summary"}),
        report(RESULTS + "/{task}/metrics.csv", caption="captions/metrics.rst", category="{task}", labels={"what": "scores"}),
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
        report(RESULTS + "/report.html", caption="captions/overview.rst", category="All tasks", labels={"what": "page"}),
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
