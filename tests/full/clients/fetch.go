// fetch URL: asks for it, trusting what the system trusts, and prints the status.
package main

import (
	"fmt"
	"net/http"
	"os"
	"time"
)

func main() {
	client := http.Client{Timeout: 10 * time.Second}
	answer, err := client.Get(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	answer.Body.Close()
	fmt.Println(answer.StatusCode)
}
