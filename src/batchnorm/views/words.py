"""The words of tables, pictures and the page, in English and Chinese."""

from batchnorm.errors import BatchNormError

LANGUAGES = ("en", "zh")

PHRASES: dict[str, tuple[str, str]] = {
    # the arms
    "none": ("without BN", "无批量归一化"),
    "batch": ("with BN", "有批量归一化"),
    "batch-torch": ("with torch.nn's BN", "有 torch.nn 的批量归一化"),
    "batch-note": ("with the note's BN", "有笔记中的批量归一化"),
    "group": ("with group norm", "有组归一化"),
    "layer": ("with layer norm", "有层归一化"),
    "batch-noise": ("with BN and noise", "有批量归一化加噪声"),
    "batch-population": ("with population norm", "有总体统计量归一化"),
    "ghost": ("with ghost BN", "有 ghost 批量归一化"),
    "ghost-16": ("with ghost BN of 16", "有每组 16 的 ghost 批量归一化"),
    "ghost-64": ("with ghost BN of 64", "有每组 64 的 ghost 批量归一化"),
    "ghost-256": ("with ghost BN of 256", "有每组 256 的 ghost 批量归一化"),
    "renorm": ("with batch renormalization", "有批量重归一化"),
    "estimator": ("with BN, debiased averages", "有批量归一化（去偏平均）"),
    "frozen": ("with frozen BN", "有冻结的批量归一化"),
    "split": ("with split BN", "有分域批量归一化"),
    "sync": ("with synchronised BN", "有同步批量归一化"),
    # the quantities
    "epoch": ("epoch", "轮数"),
    "seconds": ("seconds of training", "训练秒数"),
    "train_loss": ("train loss", "训练损失"),
    "train_accuracy": ("train accuracy", "训练精度"),
    "test_loss": ("test loss", "测试损失"),
    "test_accuracy": ("test accuracy", "测试精度"),
    "recalibrated_test_loss": ("test loss, recalibrated", "测试损失（重新校准）"),
    "recalibrated_test_accuracy": ("test accuracy, recalibrated", "测试精度（重新校准）"),
    "examples_per_second": ("examples/s", "样本/秒"),
    "parameters": ("parameters", "参数个数"),
    "input_mean": ("mean of the input", "输入的均值"),
    "input_var": ("variance of the input", "输入的方差"),
    "output_mean": ("mean of the output", "输出的均值"),
    "output_var": ("variance of the output", "输出的方差"),
    "weight": ("weight (γ)", "权重 γ"),
    "bias": ("bias (β)", "偏置 β"),
    # lines and cells
    "seed": ("seed", "种子"),
    "running line": ("{arm}, running statistics", "{arm}，滑动统计量"),
    "recalibrated line": ("{arm}, recalibrated", "{arm}，重新校准"),
    "diverged": ("diverged", "发散"),
    "arm diverged": ("{arm} (diverged)", "{arm}（发散）"),
    "cell": ("{arm}, seed {seed}", "{arm}，种子 {seed}"),
    "cell diverged": (
        "{cell}: diverged; training stopped there",
        "{cell}：损失发散，训练到此为止",
    ),
    # the table on the terminal
    "at the end": ("At the last evaluation", "最后一次评估"),
    "loss": ("loss", "损失"),
    "train": ("train", "训练"),
    "test": ("test", "测试"),
    "train loss short": ("train\nloss", "训练\n损失"),
    "train accuracy short": ("train\naccuracy", "训练\n精度"),
    "test accuracy short": ("test\naccuracy", "测试\n精度"),
    "recalibrated": ("recalibrated", "重新校准"),
    "recalibrated short": ("recali-\nbrated", "重新\n校准"),
    "examples short": ("examples\n/s", "样本\n/秒"),
    "parameters short": ("para-\nmeters", "参数\n个数"),
    "files are in": (
        "The record, the pictures and report.html are in {folder}",
        "记录、图片和 report.html 都在 {folder}",
    ),
    # the verdict
    "both": (
        (
            "With batch normalization, {network} ends at a test accuracy of {again} with recalibrated "
            "statistics ({running} with the running ones); without it, at {none}."
        ),
        (
            "加入批量归一化后，{network} 最终的测试精度为 {again}（重新校准统计量；用滑动统计量为 "
            "{running}）；不加则为 {none}。"
        ),
    ),
    "one": (
        "{network} {arm} ends at a test accuracy of {running}.",
        "{network} {arm}，最终的测试精度为 {running}。",
    ),
    "one recalibrated": (
        (
            "{network} {arm} ends at a test accuracy of {again} with recalibrated statistics "
            "({running} with the running ones)."
        ),
        "{network} {arm}，最终的测试精度为 {again}（重新校准统计量；用滑动统计量为 {running}）。",
    ),
    "some diverged": (
        (
            "{arm}: the loss stopped being finite in {count} of {total} seeds, and training ended "
            "there; their numbers are from that point."
        ),
        "{arm}：{total} 个种子中有 {count} 个损失发散，训练到此为止；所示为停止时的数值。",
    ),
    "some unfinished": (
        "{arm}: {count} of {total} seeds are not finished; the numbers are those so far.",
        "{arm}：{total} 个种子中有 {count} 个未完成；所示为目前的数值。",
    ),
    "gain hidden": (
        (
            "The gain over no normalization is {gain}; {hidden} of it hides behind running statistics "
            "that lag behind the weights, and shows only after recalibration."
        ),
        (
            "相比不加归一化，精度提高 {gain}；其中 {hidden} 因滑动统计量落后于权重而看不到，"
            "重新校准后才显现。"
        ),
    ),
    "gain plain": (
        (
            "The difference to no normalization is {gain}; recalibrating the statistics changes the "
            "accuracy by {hidden}, which is within the sampling error of the test images."
        ),
        (
            "相比不加归一化，精度变化为 {gain}；重新校准统计量使精度变化 {hidden}，"
            "在测试图片的抽样误差之内。"
        ),
    ),
    "gain lost": (
        (
            "The difference to no normalization is {gain}; recalibrating the statistics changed the "
            "accuracy by {hidden}: here the running ones did better."
        ),
        (
            "相比不加归一化，精度变化为 {gain}；重新校准统计量使精度变化 {hidden}："
            "此处滑动统计量更好。"
        ),
    ),
    "gain none": (
        (
            "The difference to no normalization is {gain}; recalibrating the statistics changed "
            "the accuracy by {hidden}."
        ),
        "与不加归一化相比，精度相差 {gain}；重新校准统计量使精度变化 {hidden}。",
    ),
    "sooner": (
        (
            "With the running statistics it passes {value} after {epochs} epochs and {seconds} s of "
            "training; without normalization that took {all_epochs} epochs and {all_seconds} s. It "
            "sees {speed} times as many examples a second."
        ),
        (
            "用滑动统计量，它训练 {epochs} 轮（{seconds} 秒）后超过 {value}；不加归一化则用了 "
            "{all_epochs} 轮（{all_seconds} 秒）。它每秒处理的样本数是后者的 {speed} 倍。"
        ),
    ),
    "exploratory": (
        "One seed: what another seed would give is not known.",
        "只有一个种子：换一个种子会怎样尚不知道。",
    ),
    "seeds": (
        "Means over {count} seeds ± standard deviation between seeds.",
        "{count} 个种子的均值 ± 种子间的标准差。",
    ),
    # is it 0.9?
    "is it": ("Is it 0.9?", "有 0.9 吗？"),
    "the claim": (
        (
            "The note says that, with batch normalization, ten epochs give a test accuracy of about "
            "0.9. After {epochs} epochs here:"
        ),
        "笔记说：加入批量归一化，扫十遍数据，测试精度可以达到 0.9 左右。这里训练 {epochs} 轮之后：",
    ),
    "yes": ("yes", "有"),
    "within": ("within 2 errors", "两倍误差之内"),
    "no": ("no", "没有"),
    "number": ("number", "数值"),
    "sampling error": ("sampling error", "抽样误差"),
    "answer": ("0.9?", "有 0.9 吗？"),
    "sampling note": (
        (
            "Sampling error: √(p(1−p)/n) for n images, of the train or test set; it does not hold the "
            "spread between seeds. Train accuracy is the running one of the last epoch, as in the book."
        ),
        (
            "抽样误差：√(p(1−p)/n)，n 为训练集或测试集的图片数，不含种子之间的差异。"
            "训练精度是最后一轮中的累计精度，与书中相同。"
        ),
    ),
    # the page
    "title": (
        "{network} on {data}, with and without batch normalization",
        "{network} 在 {data} 上：有无批量归一化的对比",
    ),
    "accuracy heading": ("Test accuracy as training goes", "训练中的测试精度"),
    "accuracy text": (
        (
            "Running statistics are averages over the last few dozen batches, while the weights went "
            "on changing; recalibrated ones are means and variances over {images} training images with "
            "the weights as they stand."
        ),
        (
            "滑动统计量是最近几十个批量的平均，而其间权重一直在变；"
            "重新校准的统计量是用当前权重在 {images} 张训练图片上算出的均值和方差。"
        ),
    ),
    "mean line": (
        "Thick: mean over the seeds. Thin: each seed.",
        "粗线：各种子的均值；细线：每个种子。",
    ),
    "play": ("Play", "播放"),
    "until": ("up to epoch", "到第几轮"),
    "table heading": ("The numbers", "数值"),
    "arm": ("arm", "对比组"),
    "curves heading": ("Curves", "曲线"),
    "against": ("against", "横轴"),
    "show": ("show", "显示"),
    "every number": ("Every number of these curves", "曲线上的全部数值"),
    "layers heading": ("Inside the layers", "层的内部"),
    "layers text": (
        (
            "At each place of a normalization layer, over {images} test images in evaluation mode, seed "
            "{seed}: the median of the channels, and the range from their 5th to their 95th percentile."
        ),
        (
            "每个归一化层所在之处，在评估模式下对 {images} 张测试图片统计，种子 {seed}："
            "线为各通道的中位数，带为第 5 到第 95 百分位。"
        ),
    ),
    "layers some": (
        "{shown} of {all} layers, evenly spaced; the others are in the record.",
        "共 {all} 层，均匀选出 {shown} 层；其余在记录中。",
    ),
    "statistic": ("statistic", "统计量"),
    "ran heading": ("What was run, and where", "运行了什么，在哪里"),
    "again heading": ("Run it again", "再运行一次"),
    "again text": (
        "The same processor, versions and thread count give the same numbers, but for times.",
        "处理器、版本和线程数相同，则除时间外数值完全相同。",
    ),
    "again python": (
        "The network or the data came from Python objects; this call names them.",
        "网络或数据来自 Python 对象；下面的调用列出了它们的名字。",
    ),
    "files": ("Files beside this page", "同一文件夹中的文件"),
    "script needed": (
        (
            "The curves are drawn by a script, which this browser does not run. The tables hold every "
            "number, and curves.svg is a picture of them."
        ),
        "曲线由脚本绘制，而此浏览器没有运行脚本。表格中有全部数值，curves.svg 是曲线的图片。",
    ),
    "chart failed": ("This chart could not be drawn:", "此图无法绘制："),
    # the study of recalibration
    "study title": (
        "Same weights, same images: only the BN statistics differ",
        "权重相同、图片相同：只有批量归一化的统计量不同",
    ),
    "study before": ("with the running statistics", "用滑动统计量"),
    "study after": ("recalibrated, without labels", "重新校准后，不用标签"),
    "study control": ("healthy (control)", "健康的网络（对照）"),
    "study moving": ("in the middle of training", "训练途中"),
    "study 4 bits": ("weights rounded to 4 bits", "权重取整到 4 位"),
    "study 3 bits": ("weights rounded to 3 bits", "权重取整到 3 位"),
    "study pruned": ("half of the convolutions pruned", "卷积权重剪去一半"),
    "study averaged": ("two networks averaged", "两个网络的权重平均"),
    "study brightness": ("brighter images", "图片变亮"),
    "study contrast": ("less contrast", "对比度降低"),
    "study noise": ("noise", "加噪声"),
    "study blur": ("blur", "模糊"),
    "study few": ("healthy, recalibrated with 16 images", "健康的网络，只用 16 张图片校准"),
    "study seed": ("seed {seed}: {numbers}", "种子 {seed}：{numbers}"),
    "study condition": ("condition", "条件"),
    "study files are in": (
        "The record, the picture and the table are in {folder}",
        "记录、图片和表格都在 {folder}",
    ),
    # the studies of the grid
    "timing": ("timing a little of each kind of cell", "正在为每类单元试运行计时"),
    "plan": (
        "{waiting} cells to run ({done} are done), about {minutes:.1f} minutes on {workers} at once",
        "待运行 {waiting} 个单元（已完成 {done} 个），{workers} 个并行，约 {minutes:.1f} 分钟",
    ),
    "finds": (
        "{name}: finds an effect of {detectable:.2f} standard deviations of the per-seed differences in 80 of 100 cases",
        "{name}：效应为各种子差值标准差的 {detectable:.2f} 倍时，100 次中可发现 80 次",
    ),
    "finds nothing": (
        "{name}: exploratory; with so few seeds and so many questions no verdict is possible (smallest p {smallest_p:.3f})",
        "{name}：仅为探索；种子太少、问题太多，无法得出结论（最小的 p 为 {smallest_p:.3f}）",
    ),
    "cells": ("cells", "单元"),
    "progress": (
        "{done} of {cells} cells after {elapsed:.1f} minutes, about {left:.1f} to go",
        "{elapsed:.1f} 分钟完成 {done}/{cells} 个单元，约剩 {left:.1f} 分钟",
    ),
    "cell failed": (
        "cell {hash} failed, attempt {attempt}: {error}",
        "单元 {hash} 第 {attempt} 次失败：{error}",
    ),
    "question": ("claim", "论断"),
    "verdict": ("verdict", "结论"),
    "effect": ("effect", "效应"),
    "interval": ("95% interval", "95% 区间"),
    "p": ("p (Holm)", "p（Holm）"),
    "supported": ("supported", "成立"),
    "contradicted": ("contradicted", "不成立"),
    "inconclusive": ("inconclusive", "无定论"),
    "few seeds": ("{verdict} (exploratory)", "{verdict}（探索性）"),
    "results are in": (
        "The record is in {folder}: studies.html, verdicts.json, verdicts.csv, cells.csv, results/",
        "记录在 {folder}：studies.html、verdicts.json、verdicts.csv、cells.csv、results/",
    ),
    # the page of the studies
    "held_out_accuracy": ("held-out accuracy", "留出集精度"),
    "recalibrated_held_out_accuracy": (
        "held-out accuracy, recalibrated",
        "留出集精度（重新校准）",
    ),
    "variance_ratio": ("variance ratio", "方差比"),
    "recalibration_gain": ("gain of recalibration", "重新校准的提高"),
    "learning_rate": ("learning rate", "学习率"),
    "accuracy": ("test accuracy", "测试精度"),
    "early_accuracy": ("test accuracy, early", "早期测试精度"),
    "drift": ("drift of the median", "中位数的漂移"),
    "power": ("power of the batch size", "批量大小的幂次"),
    "pull": ("pull on the weights", "对权重的拉力"),
    "excess_loss": ("loss above the population's", "超出总体统计量损失的部分"),
    "growth": ("growth a layer", "每层的增长"),
    "log_gradient": ("log of the gradient's size", "梯度大小的对数"),
    "loss_range": ("range of the loss", "损失的变化范围"),
    "loss_ranges": ("range of the loss", "损失的变化范围"),
    "gradient_change": ("change of the gradient", "梯度的变化"),
    "gradient_changes": ("change of the gradient", "梯度的变化"),
    "training": ("in training", "训练时"),
    "evaluation": ("in evaluation", "评估时"),
    "plain": ("in evaluation, images as they are", "评估时，图片不变"),
    "weight_spread": ("spread of the weights", "权重的分散程度"),
    "bias_spread": ("spread of the biases", "偏置的分散程度"),
    "pixels": ("from pixels as samples", "与以像素为样本之差"),
    "images": ("from each image by itself", "与逐图归一化之差"),
    "features": ("from features by hand", "与手算特征之差"),
    "reloaded": ("test accuracy, reloaded", "重新载入后的测试精度"),
    "with_gradients": ("test accuracy, gradients on", "开启梯度时的测试精度"),
    "untrained_scale": ("scale before training", "训练前的倍数"),
    "order": ("measurement, in order", "测量次序"),
    "step": ("step", "步数"),
    "depth": ("layer, from the input", "层，从输入数起"),
    "batch_size": ("images in a batch", "批量大小"),
    "moving heading": ("What goes into the last hidden layer", "最后一个隐藏层的输入"),
    "until step": ("at step", "步"),
    "at one step": ("All units, at one step", "所有单元，某一步"),
    "into a unit": ("what goes into a unit", "单元的输入"),
    "density": ("density", "密度"),
    "moving text": (
        (
            "A bar reaches from one percentile to the next (1, 5, 15, 25, 35, 50, 65, 75, 85, 95, "
            "99), and its area is the share of the values between them."
        ),
        (
            "每个柱从一个百分位数到下一个（1、5、15、25、35、50、65、75、85、95、99），"
            "面积为其间数值所占的比例。"
        ),
    ),
    "all units": ("All units", "所有单元"),
    "one unit": ("One unit, as in the paper", "一个单元，如论文所示"),
    "fan text": (
        (
            "Over the whole training: the line is the median, the bands reach to the outer "
            "percentiles (for one unit the 15th and 85th); the dashed line is the step above. "
            "Percentiles are means over the seeds."
        ),
        (
            "整个训练过程：线为中位数，带延伸到外侧的百分位数（单个单元为第 15 和第 85）；"
            "虚线为上图所在的步。百分位数为各种子的均值。"
        ),
    ),
    "fan label": (
        "At the end {low:.3g} to {high:.3g}, the median {middle:.3g}.",
        "结束时从 {low:.3g} 到 {high:.3g}，中位数 {middle:.3g}。",
    ),
    "studies title": (
        "What is said of batch normalization, tested",
        "关于批量归一化的说法，逐条检验",
    ),
    "studies counts": (
        (
            "{total} claims in {studies} studies: {supported} supported, {contradicted} contradicted, "
            "{inconclusive} inconclusive."
        ),
        (
            "{studies} 项研究、{total} 条论断：{supported} 条成立，{contradicted} 条不成立，"
            "{inconclusive} 条无定论。"
        ),
    ),
    "studies how": (
        (
            "Within a seed all arms start alike and see the same order of images. The effect is "
            "the mean over the seeds, with its 95% BCa interval; p is of a sign-flip test, "
            "corrected by Holm over the questions of a study. The range that a claim names was "
            "declared before the data were seen."
        ),
        (
            "同一种子下，各组起点相同，图片顺序相同。效应是各种子的均值，附 95% BCa 区间；"
            "p 来自符号翻转检验，并在每项研究的问题之间作 Holm 校正。"
            "论断所指的范围在看到数据之前就已声明。"
        ),
    ),
    "studies exploratory": (
        "{count} of them have too few seeds for any other verdict than inconclusive: exploratory.",
        "其中 {count} 条种子太少，只能是无定论：仅为探索。",
    ),
    "studies script": (
        (
            "The curves are drawn by a script, which this browser does not run. The tables and the "
            "pictures of the effects are whole without it."
        ),
        "曲线由脚本绘制，而此浏览器没有运行脚本。表格和效应的图不需要脚本。",
    ),
    "studies heading": ("The studies", "各项研究"),
    "study": ("study", "研究"),
    "strip text": (
        (
            "In the pictures: the dot is the effect, the line its 95% interval, a tick each seed; "
            "shaded is where the claim holds."
        ),
        "图中：圆点为效应，横线为其 95% 区间，每个短竖线是一个种子；阴影为论断成立的范围。",
    ),
    "strip label": (
        "effect {effect}, 95% interval {interval}; {rule}",
        "效应 {effect}，95% 区间 {interval}；{rule}",
    ),
    "rule above": ("claimed: above {low:g}", "论断：大于 {low:g}"),
    "rule below": ("claimed: below {high:g}", "论断：小于 {high:g}"),
    "rule between": ("claimed: {low:g} to {high:g}", "论断：{low:g} 到 {high:g}"),
    "so many seeds": ("seeds: {count}", "种子数：{count}"),
    "missing cells": (
        "{count} cells failed or were not run; the numbers are without them.",
        "{count} 个单元失败或未运行；数值中不含它们。",
    ),
    "number interval": ("number [95% interval]", "数值 [95% 区间]"),
    "study open": ("Curves, numbers, and how to run it again", "曲线、数值，以及如何再运行一次"),
    "at": ("at", "取值"),
    "band text": (
        (
            "Thick: mean over the seeds, as far as all of them go; band: ± a standard deviation "
            "between seeds. Thin: each seed."
        ),
        "粗线：各种子的均值，画到全部种子都有数值为止；带：± 种子间的标准差；细线：每个种子。",
    ),
    "heat heading": ("The grid", "网格"),
    "mean of": ("{name}, mean over the seeds", "{name}，各种子的均值"),
    "every cell": ("Every cell", "每个单元"),
    "where heading": ("Where it was run", "在哪里运行"),
    "value": ("value", "值"),
    "default": ("all", "全部"),
}


NAMES = {"lenet": "LeNet", "fashion-mnist": "Fashion-MNIST"}  # of a record's configuration


def name(configured: str) -> str:
    """A network or data set as it is written in a sentence; a user's own as it is."""
    return NAMES.get(configured, configured)


class Words:
    """The phrases of one language: `words("epoch")`, `words("cell", arm=…, seed=…)`."""

    def __init__(self, language: str = "en") -> None:
        if language not in LANGUAGES:
            raise BatchNormError(
                f"the language is {language!r} and should be one of {', '.join(LANGUAGES)}."
            )
        self.language = language

    def __call__(self, key: str, /, **values: object) -> str:
        phrase = PHRASES[key][LANGUAGES.index(self.language)]
        return phrase.format(**values) if values else phrase

    def quantity(self, name: str) -> str:
        """What a measured number is called; a probe's own by its name."""
        return self(name) if name in PHRASES else name.replace("_", " ")
