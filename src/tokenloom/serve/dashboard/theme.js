// Light or dark: the system's choice unless the button says otherwise. Runs before the page is drawn, or it would flash.
"use strict";
{
  const CHOICES = ["system", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = localStorage.getItem("tokenloom-theme");
  let choice = CHOICES.includes(stored) ? stored : "system";

  function apply() {
    const shown = choice === "system" ? (dark.matches ? "dark" : "light") : choice;
    document.documentElement.dataset.theme = shown;
    const label = document.getElementById("theme-label");
    if (label) label.textContent = `Colour theme: ${choice}`;
    document.dispatchEvent(new Event("themechange"));
  }

  dark.addEventListener("change", apply);
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
      localStorage.setItem("tokenloom-theme", choice);
      apply();
    });
  });
}
