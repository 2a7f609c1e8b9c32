// Starts both halves of the page. They share the API key, which lives here and nowhere else.
import { startChat } from "./chat.js";
import { startState } from "./state.js";

const key = document.getElementById("key");

/** Headers of a request to the server: with the key, if there is one. */
export function authorization() {
  const value = key.value.trim();
  return value ? { Authorization: `Bearer ${value}` } : {};
}

const state = startState({ authorization });
startChat({ authorization, model: () => state.model });
key.addEventListener("change", () => state.refresh());
