"""What a file outputs: logits, probabilities, or the largest of them with their classes."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy.form import Form
from growkit.errors import GrowkitError


def refuse_answers(form: Form, classes: int) -> None:
    """Raise GrowkitError where a model of so many classes cannot give the output that `form` asks for."""
    if form.output == "logits":
        return
    if classes < 2:
        what = "one class: its probability is always 1" if classes else "no classifier"
        raise GrowkitError(f"--output {form.output}: the model has {what}; choose logits")
    if form.top and form.top > classes:
        raise GrowkitError(f"--output {form.output}: the model has {classes} classes; choose top-{classes} or fewer")


def with_output(core: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """Turn the 'logits' of `core` into the output that `form` asks for; `core` is changed in place and returned.

    Raises:
        GrowkitError: as refuse_answers.
    """
    if form.output == "logits":
        return core
    (logits,) = core.graph.output
    batch, classes = logits.type.tensor_type.shape.dim
    count = batch.dim_value if batch.HasField("dim_value") else batch.dim_param
    core.graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], name="probabilities", axis=-1))
    wide, top = classes.dim_value, form.top
    refuse_answers(form, wide)
    del core.graph.output[:]
    if top is None:
        core.graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [count, wide]))
        return core
    core.graph.initializer.append(numpy_helper.from_array(np.array([top]), "top_count"))
    node = helper.make_node("TopK", ["probabilities", "top_count"], ["scores", "classes"], name="top", axis=-1)
    core.graph.node.append(node)
    for name, dtype in (("scores", TensorProto.FLOAT), ("classes", TensorProto.INT64)):
        core.graph.output.append(helper.make_tensor_value_info(name, dtype, [count, top]))
    return core
