// Renders Go templates as Ollama does, for the tests: one JSON object a line in, one a line out.
//
// In: {"template": T, "conversations": [[{"role", "content"}, ...], ...]}, and "system", "prompt" and
// "response" where they are told; out: {"texts": [...]} or {"error": E}. The data has Ollama's shape: structs, so that a missing field is an error and not
// "<no value>". Not covered: Ollama's functions (json, currentDate, ...), tools, images.
package main

import (
	"encoding/json"
	"io"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content, Thinking, ToolName, ToolCallID string
	ToolCalls, Images                             []string
}

type job struct {
	Template                 string
	Conversations            [][]message
	System, Prompt, Response string
}

func render(j job) (texts []string, err error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(j.Template)
	for i := 0; err == nil && i < len(j.Conversations); i++ {
		var out strings.Builder
		system := []string{j.System}
		for _, m := range j.Conversations[i] {
			if m.Role == "system" && j.System == "" {
				system = append(system, m.Content)
			}
		}
		err = parsed.Execute(&out, map[string]any{
			"Messages": j.Conversations[i], "System": strings.TrimPrefix(strings.Join(system, "\n\n"), "\n\n"),
			"Prompt": j.Prompt, "Response": j.Response, "Suffix": "",
			"Tools": []string{}, "Think": false, "ThinkLevel": "", "IsThinkSet": false,
		})
		texts = append(texts, out.String())
	}
	return texts, err
}

func main() {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var j job
		if err := in.Decode(&j); err == io.EOF {
			return
		} else if err != nil {
			panic(err)
		}
		texts, err := render(j)
		if err != nil {
			out.Encode(map[string]string{"error": err.Error()})
			continue
		}
		out.Encode(map[string][]string{"texts": texts})
	}
}
