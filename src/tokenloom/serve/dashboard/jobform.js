// The form of a new job: uploads its files, then creates it.

import { get, post } from "./api.js";
import { byId, say } from "./dom.js";

let onCreated = () => {};

/** `created(id)` is called with the job's id. */
export function openJobForm(created) {
  onCreated = created;
  say(byId("job-problem"), "");
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
  const button = byId("job-create");
  button.disabled = true;
  say(byId("job-problem"), "");
  try {
    const id = await create();
    byId("job-dialog").close();
    byId("job-form").reset();
    onCreated(id);
  } catch (error) {
    say(byId("job-problem"), error.message);
  } finally {
    button.disabled = false;
  }
});
