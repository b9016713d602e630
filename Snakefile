# From Decathlon-format tasks to trained networks, predictions, scores and a report on each task.
#
#   snakemake --cores 8                                         the phantom tasks
#   snakemake --cores 8 --config tasks=data/Task09_Spleen       a task of yours
#   snakemake --cores 8 benchmark                               a fixed protocol, to be repeated by others
#   snakemake --cores 8 archive --config archive=scans.txt model=MODEL      many scans, as shards of an array
#
# What runs is said in pipelines/config.yaml, where it runs in profiles/.


include: "pipelines/common.smk"
include: "pipelines/prepare.smk"
include: "pipelines/train.smk"
include: "pipelines/predict.smk"
include: "pipelines/evaluate.smk"
include: "pipelines/choose.smk"
include: "pipelines/report.smk"
include: "pipelines/benchmark.smk"
include: "pipelines/archive.smk"


rule all:
    input:
        reports(),
        models(),
    default_target: True
    localrule: True


onstart:
    preflight()


onsuccess:
    print_reports()
