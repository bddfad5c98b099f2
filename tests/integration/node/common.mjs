// What the scripts beside this share. Each is run as `node NAME.mjs FEATURE`, with URL, MODEL and KEY in the
// environment, and prints one line of JSON.
export const { URL: url, MODEL: model, KEY: key } = process.env;
export const v1 = `${url}/v1`;
export const question = "What is the capital of France? Answer in one short sentence.";
export const structureQuestion = "Which city is the capital of France?";
export const weatherQuestion = "What is the weather in Paris?";
export const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};

export async function main(features) {
  const [feature, ...rest] = process.argv[2].split(" ");
  const found = await features[feature](...rest);
  console.log(JSON.stringify(found));
  process.exit(0); // some clients keep their connections
}
