// The form of a new job: uploads its files, then creates it.

import { get, post } from "./api.js";
import { byId, say, turnOff } from "./dom.js";

let onCreated = () => {};
let creating = false;

/** The input of a parameter that the server names. */
const INPUTS = {
  training_file: "training-file",
  validation_file: "validation-file",
  suffix: "suffix",
  n_epochs: "epochs",
  batch_size: "batch-size",
  learning_rate: "learning-rate",
  r: "rank",
  seed: "job-seed",
};

/** Ties what is wrong to the input that it is about, beside the hint that it may have, or unties it. */
function mark(input, wrong) {
  const texts = (input.getAttribute("aria-describedby") ?? "").split(" ").filter((id) => id && id !== "job-problem");
  input.setAttribute("aria-describedby", [...texts, ...(wrong ? ["job-problem"] : [])].join(" "));
  input.setAttribute("aria-invalid", String(wrong));
}

/** Says what is wrong, beside the button and at its input; with "" that nothing is. */
function complain(text, param) {
  say(byId("job-problem"), text);
  const wrong = INPUTS[param?.split(".").at(-1)];
  for (const id of Object.values(INPUTS)) mark(byId(id), id === wrong);
  if (wrong) byId(wrong).focus();
}

/** `created(id)` is called with the job's id. */
export function openJobForm(created) {
  onCreated = created;
  complain("");
  byId("job-dialog").showModal();
}

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  return (await post("/v1/files", form)).id;
}

const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));

async function create() {
  const models = (await get("/v1/models")).data;
  const body = {
    model: models.find(({ parent }) => !parent).id,
    training_file: await upload(byId("training-file").files[0]),
    hyperparameters: { n_epochs: number("epochs"), batch_size: number("batch-size") },
    training: { learning_rate: number("learning-rate") },
    seed: number("job-seed"),
  };
  const suffix = byId("suffix").value;
  if (suffix) Object.assign(body, { suffix, metadata: { name: suffix } });
  const rank = number("rank");
  if (rank) body.lora = { r: rank, alpha: rank };
  const valid = byId("validation-file").files[0];
  if (valid) body.validation_file = await upload(valid);
  return (await post("/v1/fine_tuning/jobs", body)).id;
}

byId("job-cancel").addEventListener("click", () => byId("job-dialog").close());
byId("job-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (creating) return;
  creating = true;
  turnOff(byId("job-create"), true);
  complain("");
  try {
    const id = await create();
    byId("job-dialog").close();
    byId("job-form").reset();
    onCreated(id);
  } catch (error) {
    complain(error.message, error.param);
  } finally {
    creating = false;
    turnOff(byId("job-create"), false);
  }
});
