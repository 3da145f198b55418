// Generates greedily with transformers.js. Arguments: a folder whose node_modules hold it, and a JSON file
// {folder, ids: rows of token ids, mask: the same shape, tokens: how many to add}. Prints the new ids of each row as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [place, request] = process.argv.slice(2);
const { AutoModelForCausalLM, Tensor, env } = createRequire(path.join(place, "any.js"))("@huggingface/transformers");
const { folder, ids, mask, tokens } = JSON.parse(readFileSync(request, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const model = await AutoModelForCausalLM.from_pretrained(path.basename(folder), { local_files_only: true, device: "cpu" });
const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const made = await model.generate({
    input_ids: tensor(ids),
    attention_mask: tensor(mask),
    do_sample: false,
    max_new_tokens: tokens,
    min_new_tokens: tokens,
});
console.log(JSON.stringify(made.tolist().map((row) => row.slice(ids[0].length).map(Number))));
