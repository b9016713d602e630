# The rules that a protocol runs, as a module (benchmark.smk).


include: "common.smk"
include: "prepare.smk"
include: "train.smk"
include: "predict.smk"
include: "evaluate.smk"
include: "report.smk"
